import json

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from lora_lab.data import DATA_SOURCES, build_data, check_data
from lora_lab.data.files import FilesConfig
from lora_lab.data.table import read_table
from lora_lab.errors import DataError

ROWS = {
    "text": [f"a {'good' if n % 2 else 'bad'} film" + " a" * (n % 5) for n in range(40)],
    "label": ["good" if n % 2 else "bad" for n in range(40)],
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            pd.DataFrame(content).to_parquet(path)
        elif path.suffix == ".jsonl":
            rows = zip(*content.values(), strict=True)
            path.write_text("\n".join(json.dumps(dict(zip(content, row, strict=True))) for row in rows))
        else:
            pd.DataFrame(content).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
        return str(path)

    return write


def build(tokenizer, task="sequence_classification", seed=0, **options):
    return build_data(FilesConfig(**options), tokenizer, task, seed)


def all_labels(loader):
    return [label for batch in loader for label in batch["labels"].tolist()]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_data(write, encoder_tokenizer, suffix):
    data = build(encoder_tokenizer, train=write(f"train.{suffix}", ROWS), label="label")
    reference = build(encoder_tokenizer, train=write("reference.jsonl", ROWS), label="label")
    assert data.fingerprint == reference.fingerprint
    assert data.sizes == {"train": 36, "validation": 4}
    assert (data.num_labels, data.label_names) == (2, ["bad", "good"])
    assert data.test_dataloader() is None


def test_classification_batches_have_the_promised_shapes(write, encoder_tokenizer):
    data = build(encoder_tokenizer, train=write("a.csv", ROWS), label="label", batch_size=8)
    batches = list(data.train_dataloader())
    assert sorted(len(batch["labels"]) for batch in batches) == [4, 8, 8, 8, 8]  # of 36 rows
    for batch in batches:
        rows, time = batch["input_ids"].shape
        assert batch["attention_mask"].shape == batch["token_type_ids"].shape == (rows, time)
        assert batch["attention_mask"].sum(1).max() == time
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == encoder_tokenizer.pad_token_id)
        assert (batch["labels"].dtype, batch["labels"].shape) == (torch.int64, (rows,))
        word = encoder_tokenizer.convert_tokens_to_ids("good")
        assert torch.equal((batch["input_ids"] == word).any(1).long(), batch["labels"])


def test_pairs_are_told_apart_and_cut_to_the_longest_length(write, encoder_tokenizer):
    rows = {"one": ["a b c d", "a"], "two": ["e f g h ? yes", "b"], "label": [0, 1]}
    path = write("pairs.csv", rows)
    data = build(
        encoder_tokenizer,
        train=path,
        text=["one", "two"],
        label="label",
        max_length=8,
        validation_fraction=0.5,
    )
    examples = [split.examples[0] for split in data.splits.values()]
    assert sorted(len(example["input_ids"]) for example in examples) == [5, 8]
    assert all(example["token_type_ids"].unique().tolist() == [0, 1] for example in examples)


def test_regression_labels_are_floats(write, encoder_tokenizer):
    rows = {"text": ["a", "b", "c"], "score": ["1.5", "-2", "3e-1"]}
    data = build(encoder_tokenizer, "regression", train=write("r.csv", rows), label="score")
    labels = all_labels(data.train_dataloader()) + all_labels(data.val_dataloader())
    assert sorted(labels) == pytest.approx([-2, 0.3, 1.5])
    assert next(iter(data.train_dataloader()))["labels"].dtype == torch.float32
    assert (data.num_labels, data.label_names) == (1, [])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 10, 9], ["9", "10"]),
        ([1.0, 0.0, 1.0, 0.0], ["0", "1"]),
        (["10", "b", "10", "b"], ["10", "b"]),
        ([True, False, True, False], ["False", "True"]),
    ],
)
def test_classes_are_sorted_numbers_by_value_and_names_by_letter(write, encoder_tokenizer, labels, names):
    rows = {"text": ["a", "b", "c", "d"], "label": labels}
    for suffix in ("csv", "jsonl", "parquet"):
        data = build(encoder_tokenizer, train=write(f"l.{suffix}", rows), label="label")
        assert data.label_names == names


def test_causal_labels_mask_padding_by_position_and_prompts(write, decoder_tokenizer):
    rows = {"ask": ["what ?", "how", "", "how"], "answer": ["yes yes yes", "no", "a b", "no"]}
    train, validation = write("train.jsonl", rows), write("validation.jsonl", rows)
    data = build(
        decoder_tokenizer, "causal_lm", train=train, validation=validation, text=["answer"], prompt="ask"
    )
    assert (data.num_labels, data.label_names) == (0, [])
    (batch,) = data.train_dataloader()
    assert batch["attention_mask"].sum(1).sort().values.tolist() == [4, 4, 4, 7]
    read = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        # The tokenizer pads with its end token: the one at the end counts, those of the padding do not.
        assert not learned[mask == 0].any()
        given = decoder_tokenizer.decode(ids[(mask == 1) & ~learned])
        read.append((given, decoder_tokenizer.decode(ids[learned])))
    assert sorted(read) == [
        ("<s>", "a b </s>"),
        ("<s> how", "no </s>"),
        ("<s> how", "no </s>"),
        ("<s> what ?", "yes yes yes </s>"),
    ]


def test_causal_text_without_prompt_is_learned_whole_and_cut(write, decoder_tokenizer):
    path = write("t.jsonl", {"text": ["a b", "a b c d e f g h"]})
    data = build(decoder_tokenizer, "causal_lm", train=path, max_length=5, validation_fraction=0.5)
    decoded = {decoder_tokenizer.decode(split.examples[0]["labels"]) for split in data.splits.values()}
    assert decoded == {"<s> a b </s>", "<s> a b c d"}


def test_left_padding_follows_the_tokenizer(write, decoder_tokenizer):
    decoder_tokenizer.padding_side = "left"
    rows = {"text": ["a", "a b c", "a b c"]}
    train, validation = write("train.jsonl", rows), write("validation.jsonl", rows)
    (batch,) = build(decoder_tokenizer, "causal_lm", train=train, validation=validation).train_dataloader()
    assert batch["attention_mask"].sort(0).values.tolist() == [[0, 0, 1, 1, 1], [1] * 5, [1] * 5]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_split_is_fixed_by_split_seed_and_order_by_seed(write, encoder_tokenizer):
    path = write("a.csv", ROWS)
    one, two, other = (
        build(encoder_tokenizer, train=path, label="label", seed=seed, split_seed=split_seed)
        for seed, split_seed in ((0, 1), (1, 1), (0, 2))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert [b["labels"].tolist() for b in one.train_dataloader()] != [
        b["labels"].tolist() for b in two.train_dataloader()
    ]


def test_limits_keep_classes_and_choose_prefixes(write, encoder_tokenizer):
    path, test = write("a.csv", ROWS), write("b.csv", ROWS)
    limits = {"train_limit": 1, "validation_limit": 2, "test_limit": 3}
    data = build(encoder_tokenizer, train=path, test=test, label="label", **limits)
    more = build(encoder_tokenizer, train=path, test=test, label="label", test_limit=5)
    assert data.sizes == {"train": 1, "validation": 2, "test": 3}
    assert data.num_labels == 2
    kept = [data.splits["test"].examples[n]["input_ids"].tolist() for n in range(3)]
    assert kept == [more.splits["test"].examples[n]["input_ids"].tolist() for n in range(3)]


BROKEN_FILES = {
    "long row": ("a.csv", "text,label\na,0\nb,c,1\n", "line 3 has 3 values, but the header 2"),
    "short row": ("a.csv", "text,label\na\nb,1\n", "line 2 has 1 values"),
    "open quote": ("a.csv", 'text,label\n"a,0\nb,1\n', "line 3: .*quotation mark"),
    "header only": ("a.csv", "text,label\n", "has no rows"),
    "empty": ("a.csv", "", "has no rows"),
    "twin columns": ("a.csv", "text,text\na,b\n", "occurs twice"),
    "broken json": ("a.jsonl", '{"text": "a", "label": 0}\n{"text": \n', "line 2 is not valid JSON"),
    "json list": ("a.jsonl", '["a", 0]\n', "line 1 is not a JSON object"),
    "not parquet": ("a.parquet", "text,label\n", "not a readable Parquet file"),
    "no text column": ("a.csv", "texts,label\na,0\nb,1\n", "no column 'text'; did you mean 'texts'"),
    "no label column": ("a.csv", "text,labels\na,0\nb,1\n", "no column 'label'; did you mean 'labels'"),
    "blank text": ("a.csv", "text,label\na,0\n  ,1\nb,0\nc,1\n", "row 2: text column 'text' is blank"),
    "number as text": ("a.jsonl", '{"text": "a", "label": 0}\n{"text": 7, "label": 1}', "row 2: .* holds 7"),
    "text left out": ("a.jsonl", '{"text": "a", "label": 0}\n{"label": 1}', "row 2: .* holds None"),
    "blank label": ("a.csv", "text,label\na,0\nb,\nc,1\n", "row 2: label column 'label' is empty"),
    "null label": ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": null}', "row 2.*is empty"),
    "list label": ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": [1]}', "row 2.*class is a"),
    "hidden label": ("a.csv", "text,label\na,0\nb,-1\nc,1\n", "row 2.*holds -1; negative"),
    "fraction": ("a.csv", "text,label\na,0\nb,0.5\nc,1\n", "row 2.*holds 0.5, which is not a class"),
    "one class": ("a.csv", "text,label\na,0\nb,0\n", "holds '0' in all 2 rows"),
    "no classes": ("a.csv", "text,label\na,x1\nb,x2\nc,x3\n", "a different value in each of its 3 rows"),
    "one row": ("a.csv", "text,label\na,0\n", "holds '0' in all 1 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_file_is_named_with_its_row(write, encoder_tokenizer, case):
    name, content, message = BROKEN_FILES[case]
    path = write(name, content)
    with pytest.raises(DataError, match=message) as fault:
        build(encoder_tokenizer, train=path, validation=write("v.csv", ROWS), label="label")
    assert path in str(fault.value)


@pytest.mark.parametrize("value", ["x", "", "nan", "inf", "1e60"])
def test_regression_refuses_what_is_no_finite_number(write, encoder_tokenizer, value):
    path = write("r.csv", f"text,score\na,1\nb,{value}\nc,2\n")
    with pytest.raises(DataError, match=r"r\.csv: row 2: label column 'score'.*finite number"):
        build(encoder_tokenizer, "regression", train=path, label="score", validation_fraction=0.5)


def test_class_unknown_in_training_is_refused(write, encoder_tokenizer):
    train, test = write("a.csv", ROWS), write("t.csv", "text,label\na,good\nb,fine\n")
    with pytest.raises(DataError, match=r"t\.csv: row 2: label 'fine' does not occur .* known: bad, good"):
        build(encoder_tokenizer, train=train, test=test, label="label")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_table(path)


def test_prompt_that_leaves_nothing_to_learn_is_refused(write, decoder_tokenizer):
    path = write("qa.jsonl", {"ask": ["a b c d e f g", "a"], "answer": ["yes", "no"]})
    with pytest.raises(DataError, match=r"qa\.jsonl: row 1: the prompt fills all of data.max_length=5"):
        build(decoder_tokenizer, "causal_lm", train=path, text=["answer"], prompt="ask", max_length=5)


def test_single_token_is_refused_for_causal_language_modelling(write, encoder_tokenizer):
    encoder_tokenizer._tokenizer.post_processor = None
    path = write("t.jsonl", {"text": ["a b", "a", "c d"]})
    with pytest.raises(DataError, match="row 2: the text is a single token"):
        build(encoder_tokenizer, "causal_lm", train=path, validation_limit=1, validation_fraction=0.4)


def test_all_option_faults_are_told_at_once_with_their_keys(write):
    train = write("a.csv", ROWS)
    config = FilesConfig(
        train=train,
        validation=train,
        test="none.csv",
        text=["a", "b", "c"],
        batch_size=0,
        train_limit=0,
        prompt="p",
    )
    faults = check_data(config, "sequence_classification")
    keys = {fault.split(":")[0] for fault in faults}
    assert keys == {
        "data.batch_size", "data.train_limit", "data.validation", "data.test", "data.text", "data.label",
        "data.prompt",
    }  # fmt: skip
    assert "is also data.train" in " ".join(faults)
    assert "data.test: no file 'none.csv'" in " ".join(faults)
    with pytest.raises(DataError, match="data.batch_size: must be at least 1; got 0; "):
        build_data(config, None, "sequence_classification", 0)


def test_missing_path_unknown_task_and_unknown_suffix_are_told(write):
    assert "data.train: missing; give the path" in check_data(FilesConfig(), "causal_lm")[0]
    assert "did you mean 'regression'" in check_data(FilesConfig(), "regresion")[0]
    path = write("a.txt", "x")
    assert "Known: .csv, .jsonl, .parquet, .tsv" in check_data(FilesConfig(train=path), "causal_lm")[0]


def test_every_source_is_a_structured_config():
    for name, source in DATA_SOURCES.items():
        config = OmegaConf.structured(source)
        assert config.source == name
        config.merge_with({"batch_size": 4, "test_limit": None})
        assert config.batch_size == 4


def test_numpy_labels_of_parquet_are_read(write, encoder_tokenizer):
    rows = {"text": ["a", "b", "c", "d"], "label": np.array([0, 1, 1, 0], dtype=np.int8)}
    assert build(encoder_tokenizer, train=write("n.parquet", rows), label="label").label_names == ["0", "1"]
