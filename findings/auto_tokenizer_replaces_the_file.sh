#!/usr/bin/env bash
# transformers 5.19.0: AutoTokenizer does not read the tokenizer that is in the folder when the model beside it is of type
# qwen2 (or one of some forty other types that transformers lists).
#
# A tokenizer is trained with a pre-tokenizer of its own, saved by transformers, and its file names no class but the
# general one, TokenizersBackend. Read back by AutoTokenizer
#   beside a config.json of type llama   the ids are those that were written
#   beside one of type qwen2             the class is Qwen2Tokenizer, which keeps vocabulary and merges of the file, puts
#                                        the pre-tokenizer of Qwen2 and the normaliser NFC in place of the file's, and
#                                        says nothing
# With merges of one pre-tokenizer under another a text takes two to three times the tokens, and text that is not in NFC does not
# come back. Whoever trains a small model of Qwen2's architecture with a tokenizer made for its data meets this. A model
# trained so is consistent with itself, so that no loss and no test of the tokenizer in memory shows it.
#
# What rankgrpo does: a file that names no class is read as it is (rankgrpo/model/presets.py), and the tiny preset has an
# architecture under which every reader agrees.
#
# Seen with transformers 5.19.0 and 5.24.0, tokenizers 0.22:
#   llama TokenizersBackend 13 True
#   qwen2 Qwen2Tokenizer 35 False
# Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==${TRANSFORMERS:-5.19.0}"
cat > "$folder/show.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "night train to the harbour, night train to the coast, cafe\u0301"
backend = Tokenizer(models.BPE())
# A blank belongs to the word before it.
split = pre_tokenizers.Split(Regex(r"\w+\s?|[^\w\s]\s?|\s"), "isolated")
backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
backend.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
backend.train_from_iterator([TEXT.replace(", ", " , ")] * 50 + [TEXT] * 50, trainer)
written = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
for model_type in ("llama", "qwen2"):
    folder = Path(sys.argv[1]) / model_type
    written.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "TokenizersBackend", named
    read = AutoTokenizer.from_pretrained(folder)
    ids = read(TEXT)["input_ids"]
    same = ids == written(TEXT)["input_ids"] and read.decode(ids) == TEXT
    print(model_type, type(read).__name__, len(ids), same)
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
llama TokenizersBackend 13 True
qwen2 Qwen2Tokenizer 35 False
SEEN
