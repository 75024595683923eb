import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "a b c d e f g h film good bad fine dull what how ? yes no".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keeps tokens of the tests apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LORA_LAB_CACHE", str(folder))
    return folder


def word_tokenizer(template=None, **special):
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            **template, special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.fixture
def encoder_tokenizer():
    """Like BERT's: marks both ends, tells the texts of a pair apart."""
    template = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return word_tokenizer(template, pad_token="<pad>", model_input_names=names)


@pytest.fixture
def decoder_tokenizer():
    """Like SmolLM2's: pads with its end-of-text token."""
    return word_tokenizer(
        {"single": "<s> $A", "pair": "<s> $A $B"}, eos_token="</s>", pad_token="</s>", bos_token="<s>"
    )
