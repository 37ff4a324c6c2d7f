"""Separator ids under tokenizers built here, each with one of the real ones' traps."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uhd.schema import SeparatorIds, SpatialSchema, resolve_schema, resolve_separator

IMAGE = "<image>"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def wrapped(tokenizer, image=IMAGE, **specials):
    """As transformers loads it; ``image`` becomes an added token."""
    if image:
        tokenizer.add_special_tokens([image])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def bpe(pieces, merges, **settings):
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, **settings))


def byte_level(image=IMAGE):
    """Llama 3, Qwen: ",\\n", "\\n\\n" and ",b" are single pieces, there is no unknown token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(",", "Ċ"), ("Ċ", "Ċ"), (",", "b"), ("<", "s"), (">", ",")]
    pieces = letters + ["".join(pair) for pair in merges]
    tokenizer = bpe(pieces, merges)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, image)


def legacy_sentencepiece(image=IMAGE):
    """Llama 1 and 2, Mistral: a space piece opens every stretch of text, "\\n" exists as a byte alone."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", ",", "▁,", "a", "▁a", "0", "▁0", "1", "▁1"]
    merges = [("▁", ","), ("▁", "a"), ("▁", "0"), ("▁", "1")]
    tokenizer = bpe(pieces, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, image, **SPECIALS)


def metaspace(image=IMAGE):
    """Gemma: no prefix, "\\n" is a piece, and its byte token and byte-level letter are in the vocabulary too."""
    pieces = ["<unk>", "<s>", "</s>", "Ċ", *BYTES, "▁", ",", "\n", "\n\n", ",\n"]
    tokenizer = bpe(pieces, [("\n", "\n"), (",", "\n")], unk_token="<unk>", byte_fallback=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(tokenizer, image, **SPECIALS)


def unigram(image=IMAGE, newline=True):
    """T5-like: the normaliser turns "\\n" into a space; with byte tokens the vocabulary still has it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), (",", -3.0), ("▁,", -2.5), ("a", -4.0)]
    pieces += [(piece, -20.0) for piece in BYTES] if newline else []
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=newline))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return wrapped(tokenizer, image, **SPECIALS)


def naive(tokenizer, schema, grid, after=""):
    """Ids from tokenising the expanded text, image tokens taken out: what this library does not do."""
    views = "".join(IMAGE if is_view(symbol) else symbol for symbol in schema.symbols(grid))
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return [value for value in tokenizer.encode(views + after, add_special_tokens=False) if value != image]


def is_view(symbol):
    return symbol not in (",", "\n")


def ours(tokenizer, schema, grid):
    found = resolve_schema(tokenizer, schema)
    return [value for symbol in schema.symbols(grid) if not is_view(symbol) for value in found[symbol].ids]


UHD = SpatialSchema.preset("llava-uhd")
TRAILING = SpatialSchema(around_image=("", "\n"))  # as MiniCPM-V 2.0's last newline


def token(tokenizer, name):
    value = tokenizer.convert_tokens_to_ids(name)
    assert tokenizer.convert_ids_to_tokens(value) == name
    return value


@pytest.mark.parametrize("image", [IMAGE, None], ids=["image token", "no image token"])
@pytest.mark.parametrize(
    "make, comma, newline, how",
    [
        (byte_level, ",", "Ċ", "probe"),
        (legacy_sentencepiece, "▁,", "<0x0A>", "probe"),
        (metaspace, ",", "\n", "probe"),
        (unigram, "▁,", "<0x0A>", "vocabulary"),
    ],
)
def test_separators_under_every_kind_of_tokenizer(make, comma, newline, how, image):
    tokenizer = make(image)
    size = len(tokenizer)
    assert resolve_schema(tokenizer, UHD) == {
        ",": SeparatorIds((token(tokenizer, comma),), "probe"),
        "\n": SeparatorIds((token(tokenizer, newline),), how),
    }
    assert len(tokenizer) == size  # never changed
    assert tokenizer.decode([token(tokenizer, newline)]) == "\n"


def test_trap_merging_pieces():
    for make, double in [(byte_level, "ĊĊ"), (metaspace, "\n\n")]:
        tokenizer = make()
        assert len(tokenizer.encode(",\n", add_special_tokens=False)) == 1
        # the text after the image swallows the schema's last symbol
        wrong = naive(tokenizer, TRAILING, (1, 2), after="\n")
        assert wrong == [token(tokenizer, ","), token(tokenizer, double)]
        assert ours(tokenizer, TRAILING, (1, 2)) == [token(tokenizer, ","), resolve_separator(tokenizer, "\n").ids[0]]
        assert tokenizer.decode(ours(tokenizer, TRAILING, (1, 2))) == ",\n"


def test_trap_letters_as_surroundings():
    tokenizer = byte_level()
    assert token(tokenizer, ",") not in tokenizer.encode("a,b", add_special_tokens=False)
    assert resolve_separator(tokenizer, ",").ids == (token(tokenizer, ","),)


def test_trap_prefix_space():
    tokenizer = legacy_sentencepiece()
    space, newline, comma = (token(tokenizer, name) for name in ("▁", "<0x0A>", "▁,"))
    assert naive(tokenizer, UHD, (2, 1)) == [space, newline, space, newline]
    assert ours(tokenizer, UHD, (2, 1)) == [newline, newline]
    # the bare piece exists, but it is not what this tokenizer writes beside an image
    assert token(tokenizer, ",") != comma
    assert ours(tokenizer, UHD, (1, 2)) == [comma, newline]


def test_trap_decoys_in_the_vocabulary():
    tokenizer = metaspace()
    decoys = {token(tokenizer, "<0x0A>"), token(tokenizer, "Ċ")}
    assert not decoys & set(ours(tokenizer, UHD, (3, 3)))


def test_trap_normalised_newline():
    tokenizer = unigram()
    assert naive(tokenizer, UHD, (2, 1)) == [token(tokenizer, "▁")] * 2
    assert ours(tokenizer, UHD, (2, 1)) == [token(tokenizer, "<0x0A>")] * 2


def test_trap_no_newline_at_all():
    tokenizer = unigram(newline=False)
    assert naive(tokenizer, UHD, (2, 1)) == [token(tokenizer, "▁")] * 2  # silently a space
    with pytest.raises(ValueError, match=r"cannot write '\\n': .* given=\{'\\n': id\}"):
        resolve_schema(tokenizer, UHD)
    with pytest.raises(ValueError, match="cannot write ';'"):  # only the unknown token
        resolve_separator(tokenizer, ";")
    found = resolve_schema(tokenizer, UHD, given={"\n": 6})
    assert found["\n"] == SeparatorIds((6,), "given")
    assert found[","] == SeparatorIds((token(tokenizer, "▁,"),), "probe")


def test_trap_a_context_that_strips_its_neighbours():
    tokenizer = byte_level(image=None)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<eat>", lstrip=True, rstrip=True)]})
    assert tokenizer.encode("<eat>\n<eat>", add_special_tokens=False) == [token(tokenizer, "<eat>")] * 2
    for image_token in (None, "<eat>"):
        assert resolve_separator(tokenizer, "\n", image_token=image_token).ids == (token(tokenizer, "Ċ"),)


def test_trap_a_context_that_melts_into_its_neighbours():
    tokenizer = byte_level(image=None)
    tokenizer.add_tokens([AddedToken("im", single_word=True)])
    assert token(tokenizer, "im") not in tokenizer.encode("im12im", add_special_tokens=False)
    digits = SeparatorIds((token(tokenizer, "1"), token(tokenizer, "2")), "pieces")
    assert resolve_separator(tokenizer, "12") == digits


@pytest.mark.parametrize("make", [byte_level, legacy_sentencepiece, metaspace])
def test_markers(make):
    schema = SpatialSchema.preset("minicpm-v-2.6")
    tokenizer = make()
    pieces = resolve_separator(tokenizer, "<slice>")
    assert pieces.how == "pieces"
    assert tokenizer.decode(list(pieces.ids)) == "<slice>"
    names = [symbol for symbol in schema.separators if symbol != "\n"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    found = resolve_schema(tokenizer, schema, num_images=2)
    assert list(found) == [*schema.separators, "0", "1"]
    assert [found[name] for name in names] == [SeparatorIds((token(tokenizer, name),), "vocabulary") for name in names]


def test_learned_symbols_have_no_ids():
    assert resolve_schema(byte_level(), SpatialSchema.preset("llava-uhd-better")) == {}


def test_symbols_that_would_look_alike_raise():
    schema = SpatialSchema.preset("minicpm-v-2.6")
    assert len(resolve_schema(byte_level(), schema, num_images=10)) == len(schema.separators) + 10
    with pytest.raises(ValueError, match="'1' and '11' both resolve"):
        resolve_schema(byte_level(), schema, num_images=12)
    with pytest.raises(ValueError, match="',' and '\\\\n' both resolve"):
        resolve_schema(byte_level(), UHD, given={"\n": 11, ",": 11})
    with pytest.raises(ValueError, match="'<ab>' and '<ba>' both resolve"):
        resolve_schema(byte_level(), SpatialSchema(around_slice=("<ab>", "<ba>")))


def test_wrong_arguments():
    tokenizer = byte_level()
    with pytest.raises(TypeError, match=r"wrap a tokenizers\.Tokenizer"):
        resolve_separator(tokenizer.backend_tokenizer, ",")
    with pytest.raises(ValueError, match="'<img>' is not one token"):
        resolve_separator(tokenizer, ",", image_token="<img>")
    with pytest.raises(ValueError, match="non-empty"):
        resolve_separator(tokenizer, "")
    with pytest.raises(ValueError, match=r"ids given for \[';'\]"):
        resolve_schema(tokenizer, UHD, given={";": 3})
    for ids in (-1, [], "x", [1.5]):
        with pytest.raises(ValueError, match="non-negative"):
            resolve_schema(tokenizer, UHD, given={",": ids})
    assert resolve_schema(tokenizer, UHD, given={",": [3, 4]})[","].ids == (3, 4)
