"""Tables of data of one's own: labels, dialects, splits, and what is said of them."""

import csv
import json
import logging
import random
from collections import Counter

import pandas as pd
import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, read_label_names, save_adapter
from lora_lab.data import FilesConfig, build_data, check_data
from lora_lab.data.examples import Examples
from lora_lab.data.table import Table, read_table
from lora_lab.data.text import classes_share, set_aside
from lora_lab.data.tokens import encode
from lora_lab.errors import CheckpointError, DataError
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from tests.data.conftest import WORDS, word_tokenizer


def build(tokenizer, path, task="sequence_classification", **options):
    label = None if task == "causal_lm" else "label"
    return build_data(FilesConfig(**{"train": str(path), "label": label} | options), tokenizer, task, 0)


def json_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def labelled(values, text="a"):
    return [{"text": text, "label": value} for value in values]


# Labels are identities


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([9007199254740992, 9007199254740993], ["9007199254740992", "9007199254740993"]),
        ([2**70, 2**70 + 1], [str(2**70), str(2**70 + 1)]),
        (["007", "7"], ["007", "7"]),
        (["1e3", "1000"], ["1000", "1e3"]),
        (["+1", "1"], ["+1", "1"]),
        ([1, True], ["1", "True"]),
        (["nan", "None"], ["None", "nan"]),
        (["Ja", "ja", " ja "], ["Ja", "ja"]),
        (["1", "1.0", "2"], ["1", "2"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_two_labels_are_one_class_only_where_they_are_the_same(
    tmp_path, encoder_tokenizer, labels, names, suffix
):
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *(["a", label] for label in labels * 3)])
    elif suffix == ".parquet":
        if any(isinstance(label, bool) or label == 2**70 for label in labels):
            return  # its columns have one type, and no whole numbers of this size
        pd.DataFrame(labelled(labels * 3)).to_parquet(path)
    else:
        json_lines(path, labelled(labels * 3))
    assert build(encoder_tokenizer, path).label_names == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, "1"], r"row 3: label column 'label' holds '1', a text, and in row 1 1, a number"),
        (
            ["True", True],
            r"row 2: label column 'label' holds True, a truth value, and in row 1 'True', a text",
        ),
        ([0, 9007199254740994.0], r"row 2: .* not exact at this size"),
        (["a", "\ud83d"], r"row 2: .* half of a character"),
        ([0, ["x" * 10**6]], r"row 2: .{0,200}; a class is a name"),
    ],
)
def test_labels_that_might_be_meant_as_one_class_are_refused(tmp_path, encoder_tokenizer, labels, message):
    path = json_lines(tmp_path / "a.jsonl", labelled(labels))
    with pytest.raises(DataError, match=message):
        build(encoder_tokenizer, path)


# Dialects


def test_values_of_any_content_come_back_from_csv_and_tsv(tmp_path):
    chance = random.Random(5)
    pieces = ['"', ",", "\t", "\n", "\r\n", ";", "a", " ", "é", '""', "\\"]
    rows = [["".join(chance.choices(pieces, k=chance.randint(1, 12))) for _ in range(3)] for _ in range(300)]
    for name, delimiter, option in (("a.csv", ",", None), ("a.TSV", "\t", None), ("b.csv", ";", ";")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([["x", "y", "z"], *rows])
        assert read_table(tmp_path / name, option).frame.to_numpy().tolist() == rows
    frame = pd.DataFrame(rows, columns=["x", "y", "z"])
    frame.to_csv(tmp_path / "pandas.tsv", sep="\t", index=False)
    assert read_table(tmp_path / "pandas.tsv").frame.to_numpy().tolist() == rows


def test_a_file_whose_quotation_marks_enclose_nothing_is_read_where_it_is_said(tmp_path, encoder_tokenizer):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"a" film\tgood\n"b\tbad\n' + "c\tgood\nd\tbad\n")
    with pytest.raises(DataError, match=r"line 2: .*from line 2 on .* data.quotes to false"):
        build(encoder_tokenizer, path)
    assert read_table(path, quotes=False).frame["text"].tolist() == ['"a" film', '"b', "c", "d"]
    assert build(encoder_tokenizer, path, quotes=False).sizes == {"train": 3, "validation": 1}


def test_a_delimiter_is_asked_for_where_the_header_is_one_name_and_checked(tmp_path, encoder_tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("text;label\n" + "a, b;good\nc;bad\n" * 5)
    message = "If ';' stands between values, set data.delimiter to it"
    with pytest.raises(DataError, match=f"line 2 has 2 values, but the header 1 .*{message}"):
        build(encoder_tokenizer, path)
    whole = tmp_path / "b.csv"
    whole.write_text(path.read_text().replace(",", ""))
    with pytest.raises(DataError, match=f"no column 'label'.*{message}"):
        build(encoder_tokenizer, whole)
    assert build(encoder_tokenizer, path, delimiter=";").label_names == ["bad", "good"]
    for delimiter in ("", ";;", '"', "\n"):
        assert check_data(FilesConfig(train=str(path), label="label", delimiter=delimiter), "regression")
    parquet = tmp_path / "a.parquet"
    pd.DataFrame(labelled([0, 1])).to_parquet(parquet)
    faults = check_data(FilesConfig(train=str(parquet), label="label", delimiter=";"), "regression")
    assert faults == ["data.delimiter: only CSV and TSV files have one; leave it empty"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_very_long_values_are_read_and_the_process_keeps_its_limit(tmp_path, encoder_tokenizer, suffix):
    limit = csv.field_size_limit()
    text = "good film " * 50_000
    rows = [[text, "x"], ["a", "y"]] * 2
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        json_lines(path, [dict(zip(("text", "label"), row, strict=True)) for row in rows])
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows(
                [["text", "label"], *rows]
            )
    data = build(encoder_tokenizer, path, max_length=9)
    assert data.facts()["train"]["cut"] + data.facts()["validation"]["cut"] == 2
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("column", ["text", "ask"])
@pytest.mark.parametrize("broken", ["a \ud83d", "\udc00", "good \udfff film"])
def test_half_of_a_character_is_refused_with_its_row(tmp_path, decoder_tokenizer, column, broken):
    rows = [{"ask": "how", "text": "a b"}, {"ask": "what", "text": "c d"} | {column: broken}]
    path = json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=f"row 2: text column '{column}' has half of a character"):
        build(decoder_tokenizer, path, "causal_lm", prompt="ask")


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', '{"n": ' + "1" * 5000 + "}", "[" * 100_000])
def test_json_that_says_two_things_or_cannot_be_read_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=r"line 2 is not valid JSON"):
        read_table(tmp_path / "a.jsonl")


# Splits


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ({"a": 90, "b": 10}, 10, {"a": 9, "b": 1}),
        ({"a": 5, "b": 5, "c": 5}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": 10, "b": 1, "c": 1, "d": 1}, 3, {"a": 3, "b": 0, "c": 0, "d": 0}),
        ({"a": 1, "b": 1}, 1, {"a": 1, "b": 0}),
    ],
)
def test_each_class_has_its_share_and_keeps_a_row_where_it_can(sizes, count, expected):
    assert classes_share(sizes, count) == expected


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_classes_are_within_a_row_and_add_up(seed):
    chance = random.Random(seed)
    sizes = {str(n): chance.randint(1, 60) for n in range(chance.randint(2, 9))}
    total = sum(sizes.values())
    count = chance.randint(1, total - 1)
    parts = classes_share(sizes, count)
    assert sum(parts.values()) == count
    assert all(abs(parts[name] - size * count / total) < 1 for name, size in sizes.items())
    assert all(0 <= parts[name] <= size for name, size in sizes.items())


def test_validation_and_test_are_set_aside_with_all_classes_in_their_shares(tmp_path, encoder_tokenizer):
    labels = ["x"] * 160 + ["y"] * 32 + ["z"] * 8
    rows = [{"text": WORDS[n % 17] + " a" * (n // 17), "label": label} for n, label in enumerate(labels)]
    path = json_lines(tmp_path / "a.jsonl", rows)
    shares = {"test_fraction": 0.25, "validation_fraction": 0.125}
    data = build(encoder_tokenizer, path, **shares)
    of_splits = {
        name: Counter(data.label_names[example["labels"]] for example in split.examples)
        for name, split in data.splits.items()
    }
    assert of_splits == {
        "train": {"x": 100, "y": 20, "z": 5},
        "validation": {"x": 20, "y": 4, "z": 1},
        "test": {"x": 40, "y": 8, "z": 2},
    }
    # The test rows do not depend on how many are set aside for validation, nor on the run's seed.
    other = build_data(
        FilesConfig(train=str(path), label="label", **shares | {"validation_fraction": 0.5}),
        encoder_tokenizer, "sequence_classification", 7,
    )  # fmt: skip
    for one, two in zip(data.splits["test"].examples, other.splits["test"].examples, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_other_tasks_set_rows_aside_as_they_come(tmp_path, encoder_tokenizer):
    path = json_lines(tmp_path / "a.jsonl", labelled([n / 4 for n in range(20)]))
    data = build(encoder_tokenizer, path, "regression", test_fraction=0.2)
    assert data.sizes == {"train": 14, "validation": 2, "test": 4}


def test_a_test_share_beside_test_rows_or_without_rows_left_is_refused(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", labelled([0, 1]))
    test = json_lines(tmp_path / "t.jsonl", labelled([0, 1]))
    for options, message in (
        ({"test": str(test), "test_fraction": 0.1}, "already has a test split"),
        ({"test_fraction": 0.9}, "leave rows for training"),
        ({"test_fraction": -0.1}, "must be at least 0"),
        ({"split_seed": 2**32}, "data.split_seed: must be below 4294967296"),
        ({"max_length": 2**24 + 1}, "data.max_length: must be at most"),
    ):
        (fault,) = check_data(FilesConfig(train=str(path), label="label", **options), "regression")
        assert message in fault
    with pytest.raises(DataError, match="2 rows are too few to set aside 2 for test"):
        set_aside(Table(pd.DataFrame(labelled([0, 1])), "file"), 2, None, "test")


# What is said of the data


def test_shared_rows_and_cut_texts_are_counted_and_said(tmp_path, encoder_tokenizer, caplog):
    train = labelled(["x", "y"] * 4, "a b c d e f g") + [{"text": "good film", "label": "x"}]
    validation = [{"text": "good film", "label": "y"}, {"text": "bad film", "label": "y"}]
    test = [*validation, {"text": "a b c d e f g", "label": "x"}, {"text": "fine", "label": "x"}]
    paths = {
        name: str(json_lines(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("validation", validation), ("test", test))
    }
    with caplog.at_level(logging.WARNING):
        data = build(encoder_tokenizer, json_lines(tmp_path / "a.jsonl", train), max_length=8, **paths)
    assert data.facts() == {
        "train": {"rows": 9, "cut": 8},
        "validation": {"rows": 2, "cut": 0, "also_in_train": 1},
        "test": {"rows": 4, "cut": 1, "also_in_train": 2, "also_in_validation": 2},
    }
    assert "texts cut at the end to data.max_length=8 tokens: 8 of 9 in train, 1 of 4 in test." in caplog.text
    assert "rows whose texts are also in train: 1 of 2 in validation, 2 of 4 in test." in caplog.text
    assert "also in validation: 2 of 4 in test" in caplog.text


def test_cut_answers_are_counted_by_the_tokens_that_are_lost(tmp_path, decoder_tokenizer):
    rows = [{"ask": "how ?", "text": " ".join("a" * n)} for n in range(1, 9)]
    path = json_lines(tmp_path / "a.jsonl", rows)
    data = build(decoder_tokenizer, path, "causal_lm", prompt="ask", max_length=8, validation_fraction=0.5)
    # <s> how ? and the end leave room for four.
    assert sum(facts["cut"] for facts in data.facts().values()) == 4
    assert data.remarks()[0].startswith("answers cut at the end to data.max_length=8 tokens: ")
    lost = [split.examples[n]["input_ids"][-1] != 3 for split in data.splits.values() for n in range(4)]
    assert sum(lost) == 4


def test_whole_texts_leave_nothing_to_say(tmp_path, encoder_tokenizer, caplog):
    rows = [{"text": f"{word} film", "label": "xy"[n % 2]} for n, word in enumerate(WORDS)]
    data = build(encoder_tokenizer, json_lines(tmp_path / "a.jsonl", rows), max_length=4)
    assert data.remarks() == []
    assert "data:" not in caplog.text


# Special tokens at the border of prompt and text


TEMPLATES = {
    "bos": {"single": "<s> $A", "pair": "<s> $A $B"},
    "bos and eos": {"single": "<s> $A </s>", "pair": "<s> $A </s> $B </s>"},
    "eos": {"single": "$A </s>", "pair": "$A </s> $B </s>"},
    "none": None,
}


@pytest.mark.parametrize("written", ["plain", "start", "both", "everywhere"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_stand_once_at_start_and_end(template, written):
    tokenizer = word_tokenizer(TEMPLATES[template], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    ask, answer = {
        "plain": ("how ?", "yes no"),
        "start": ("<s> how ?", "yes no"),
        "both": ("<s> how ?", "yes no </s>"),
        "everywhere": ("<s> how ? </s>", "<s> yes no </s>"),
    }[written]
    front = ["<s>"] if template.startswith("bos") or written != "plain" else []
    given, learned = [*front, "how", "?"], ["yes", "no", "</s>"]
    for max_length in (16, len(given) + 1):
        tokens = encode(Examples([answer], None, [ask], None), tokenizer, True, max_length)
        assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) == (given + learned)[:max_length]
        assert tokens.prompts.tolist() == [len(given)]
        assert tokens.cut.tolist() == [max_length != 16]
    alone = encode(Examples([answer.replace("<s> ", "")], None, None, None), tokenizer, True, 16)
    start = ["<s>"] if template.startswith("bos") else []
    assert tokenizer.convert_ids_to_tokens(alone.ids.tolist()) == [*start, *learned]


@pytest.mark.parametrize("model", ["t5", "roberta"])
@pytest.mark.parametrize("written", ["good</s>", "<s>good</s>", " <s>good"])
def test_an_end_that_a_text_writes_out_is_not_doubled_for_classes(model, written):
    tokenizer = build_tokenizer(ModelConfig(name=f"random:{model}"))
    if model == "t5":
        written = written.replace("<s>", "")  # it has no start
    tokens = encode(Examples([written, "good"], [written, "good"], None, None), tokenizer, False, 32)
    one, two = (tokens.ids[tokens.offsets[n] : tokens.offsets[n + 1]].tolist() for n in (0, 1))
    assert [i for i in one if i != tokenizer(" ", add_special_tokens=False)["input_ids"][0]] == two


# Names of classes


def test_names_of_classes_are_stored_with_the_adapter_and_written_into_the_model(tmp_path):
    names = ["1e3", "true", "${oc.env:HOME}", "ja: nein", "ü\n"]
    config = ModelConfig(name="random:bert")
    model = build_model(config, len(names), label_names=names)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: n for n, name in enumerate(names)}
    adapters = inject(model, LoRASpec(rank=1))
    save_adapter(adapters, tmp_path / "adapter", label_names=names)
    assert read_label_names(tmp_path / "adapter") == names
    other = build_model(config, len(names))
    assert other.config.id2label[0] == "LABEL_0"
    load_adapter(other, tmp_path / "adapter", any_base=True)  # both are random
    assert other.config.id2label == dict(enumerate(names))
    save_adapter(adapters, tmp_path / "adapter")
    assert read_label_names(tmp_path / "adapter") == []


@pytest.mark.parametrize("classes", ["[a, a]", "[a, [b]]", "a"])
def test_stored_names_that_are_none_are_refused(tmp_path, classes):
    model = build_model(ModelConfig(name="random:bert"), 2)
    save_adapter(inject(model, LoRASpec(rank=1)), tmp_path / "adapter", label_names=["a", "b"])
    path = tmp_path / "adapter" / "lora_lab.yaml"
    path.write_text(path.read_text().replace("classes:\n- a\n- b\n", f"classes: {classes}\n"))
    with pytest.raises(CheckpointError, match="`classes`"):
        read_label_names(tmp_path / "adapter")


def test_stored_names_decide_the_ids_of_other_rows(tmp_path):
    tokenizer = build_tokenizer(ModelConfig(name="random:bert"))
    rows = json_lines(tmp_path / "a.jsonl", labelled(["b"] * 4))
    config = FilesConfig(train=str(rows), label="label")
    data = build_data(config, tokenizer, "sequence_classification", 0, ["a", "b", "c"])
    assert (data.num_labels, data.label_names) == (3, ["a", "b", "c"])
    assert {int(example["labels"]) for example in data.splits["train"].examples} == {1}
    with pytest.raises(DataError, match=r"row [1-4]: label 'b' does not occur .*; known: x, y"):
        build_data(config, tokenizer, "sequence_classification", 0, ["x", "y"])
