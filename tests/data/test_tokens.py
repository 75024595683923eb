import pytest
import torch

from lora_lab.data import tokens as module
from lora_lab.data.examples import Examples
from lora_lab.data.tokens import tokenise, tokenizer_fingerprint

TEXTS = Examples(texts=["a b", "c d e f", "g"], pairs=None, prompts=None, labels=None)


def cached_files(root):
    return sorted((root / "tokens").glob("*"))


def test_second_run_reads_the_cache(own_cache, encoder_tokenizer, monkeypatch):
    first = tokenise(TEXTS, encoder_tokenizer, False, 16)
    monkeypatch.setattr(module, "encode", None)
    second = tokenise(TEXTS, encoder_tokenizer, False, 16)
    for name in ("ids", "offsets", "types", "prompts"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype
    assert first.lengths.tolist() == [4, 6, 3]
    assert len(cached_files(own_cache)) == 1


@pytest.mark.parametrize("change", ["length", "texts", "tokenizer", "causal"])
def test_cache_is_not_used_for_anything_else(own_cache, encoder_tokenizer, decoder_tokenizer, change):
    tokenise(TEXTS, encoder_tokenizer, False, 16)
    texts = Examples(["a b", "c d e f", "h"], None, None, None) if change == "texts" else TEXTS
    tokenizer = decoder_tokenizer if change == "tokenizer" else encoder_tokenizer
    tokenise(texts, tokenizer, change == "causal", 5 if change == "length" else 16)
    assert len(cached_files(own_cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_is_rebuilt(own_cache, encoder_tokenizer, damage):
    first = tokenise(TEXTS, encoder_tokenizer, False, 16)
    (path,) = cached_files(own_cache)
    whole = path.read_bytes()
    damaged = {"cut": whole[:-5], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage]
    path.write_bytes(damaged)
    assert torch.equal(tokenise(TEXTS, encoder_tokenizer, False, 16).ids, first.ids)
    assert path.read_bytes() == whole


def test_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path, encoder_tokenizer, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_LAB_CACHE", str(blocked))
    assert len(tokenise(TEXTS, encoder_tokenizer, False, 16).lengths) == 3
    assert "tokens are not cached" in caplog.text


def test_fingerprint_survives_use_and_tells_vocabularies_apart(encoder_tokenizer, decoder_tokenizer):
    before = tokenizer_fingerprint(encoder_tokenizer)
    encoder_tokenizer(["a b", "c"], truncation=True, max_length=3, padding=True)
    assert tokenizer_fingerprint(encoder_tokenizer) == before != tokenizer_fingerprint(decoder_tokenizer)
    encoder_tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(encoder_tokenizer) != before


def test_chunks_do_not_change_the_tokens(own_cache, encoder_tokenizer, monkeypatch):
    whole = module.encode(TEXTS, encoder_tokenizer, False, 16)
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 2)
    assert torch.equal(module.encode(TEXTS, encoder_tokenizer, False, 16).ids, whole.ids)
