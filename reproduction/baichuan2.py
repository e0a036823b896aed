"""The tokenizer of the paper's model: Baichuan2 is published with a SentencePiece model and its
chat format in code.

    pip install transformers==5.23.0 sentencepiece protobuf
    python -m reproduction.baichuan2 FOLDER

writes tokenizer.json and chat_template.jinja into the folder, and says how many texts made of the
model's own pieces the new tokenizer reads otherwise than sentencepiece does. For other models than
Baichuan2 it writes tokenizer.json alone.
"""

import sys
from pathlib import Path

import tokenizers

from data import read_object, replace_file

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"                   # how SentencePiece writes one
CHAT = ("{% for m in messages %}{% if m.role == 'user' %}USER{% elif m.role == 'assistant' %}"
        "ASSISTANT{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}ASSISTANT"
        "{% endif %}")


def convert(folder):
    """Write the files; returns a report. ValueError with one sentence where that cannot be done,
    and then nothing is written."""
    folder = Path(folder)
    path, files = folder / "tokenizer.model", {}
    if (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}: has a tokenizer.json already; move it away to make another "
                         "one")
    proto, original, backend = read_model(path)
    config, generation = (read_object(file, file.read_bytes() if file.is_file() else b"{}")
                          for file in (folder / "config.json", folder / "generation_config.json"))
    if config.get("model_type") == "baichuan":
        ids = [generation.get("user_token_id", 195), generation.get("assistant_token_id", 196)]
        if not all(type(i) is int and 0 <= i < len(proto.pieces) for i in ids):
            raise ValueError(f"{path}: has no pieces of the ids {ids}, which mark the turns of "
                             "Baichuan2")
        user, assistant = (proto.pieces[i].piece for i in ids)
        backend.add_special_tokens([user, assistant])
        files["chat_template.jinja"] = CHAT.replace("USER", user).replace("ASSISTANT", assistant)
    texts = texts_of(proto)
    other = [text for text in texts if backend.encode(text).ids != original.encode(text)]
    files["tokenizer.json"] = backend.to_str(pretty=True)
    for name, content in files.items():
        replace_file(folder / name, content.encode())
    return (f"wrote {' and '.join(files)} to {folder}; of {len(texts)} texts made of its pieces it "
            f"reads {len(other)} otherwise than sentencepiece"
            + (f", such as {other[0]!r}" if other else ""))


def read_model(path):
    """(what tokenizer.model says of itself, sentencepiece's tokenizer, transformers' of it)."""
    try:
        import google.protobuf                         # noqa: F401  transformers reads with it
        from sentencepiece import SentencePieceProcessor
        from transformers.convert_slow_tokenizer import (SentencePieceExtractor, SpmConverter,
                                                         generate_merges)
        build = SpmConverter.build_tokenizer_from_spm_proto
    except (ImportError, AttributeError):
        raise ValueError("reading tokenizer.model needs three packages: pip install "
                         "transformers==5.23.0 sentencepiece protobuf") from None
    try:
        extractor = SentencePieceExtractor(str(path))
        original = SentencePieceProcessor(model_file=str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:                                  # of three libraries
        raise ValueError(f"{path}: no SentencePiece model, or a damaged one") from None
    proto = extractor.proto
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError(f"{path}: only SentencePiece models of type BPE are converted")
    parts = extractor.extract(None)
    scores = {piece.piece: piece.score for piece in proto.pieces}      # their order, not the ids'
    backend = build(proto, parts["vocab"], generate_merges(parts["vocab"], scores))
    backend.add_special_tokens([proto.trainer_spec.unk_piece])
    backend.add_tokens(parts["additional_special_tokens"])
    add_rules(backend, proto.normalizer_spec)
    return proto, original, backend


def add_rules(backend, rules):
    """Two rules of other models, which transformers' converter leaves out and Baichuan2 has not."""
    normalizers, before = tokenizers.normalizers, []
    if rules.remove_extra_whitespaces:
        before += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
                   normalizers.Replace(tokenizers.Regex("\\A | \\z"), "")]
    if rules.add_dummy_prefix:
        before += [normalizers.Prepend(SPACE)]
        decoders = tokenizers.decoders
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(),
                                             decoders.Strip(" ", 1, 0)])
    *charsmap, space = backend.normalizer
    backend.normalizer = normalizers.Sequence([*charsmap, *before, space])


def texts_of(proto):
    """Every plain piece, three in a row, three with other spaces, and every mark inside a word."""
    kinds = proto.SentencePiece
    normal, marks = ([piece.piece.replace(SPACE, " ") for piece in proto.pieces
                      if piece.type == kind] for kind in (kinds.NORMAL, kinds.USER_DEFINED))
    texts = normal + [" ".join(normal[i:i + 3]) for i in range(0, len(normal), 3)]
    texts += [f"\n\n{a}\t{b}  {c}\n " for a, b, c in zip(normal, normal[1:], normal[2:])]
    return texts + [f"a{mark}b" for mark in marks]


def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("usage: python -m reproduction.baichuan2 FOLDER, a model's folder with a "
                         "SentencePiece tokenizer.model")
    print(convert(arguments[0]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"reproduction.baichuan2: {error}", file=sys.stderr)
        sys.exit(2)
