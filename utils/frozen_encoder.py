"""Text encoders of Hugging Face, frozen: read from safetensors, never trained, never part of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError

# config.json's model_type -> the class of transformers that holds the encoder alone.
CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
CACHE_BYTES = 2**30  # features that are kept, on the host
PROBE = "a red 7"


class FrozenEncoder:
    """Texts, in any case -> features in float32 of the last layer, each text alone, so that others don't change a bit.

    Attributes:
        width: channels of the features.
        sha256: of weights, vocabulary and how a probe is cut into tokens; not of names and places.
        most: tokens that can be read; None: any number.
    """

    def __init__(self, place: str, device) -> None:
        """place: a folder, or a name on the Hugging Face hub.

        Raises:
            InputError: transformers or the encoder is missing, of another kind, damaged, or not in safetensors.
        """
        self.place, self.device = place, torch.device(device)
        try:
            import transformers
        except ImportError:
            raise InputError(f"model.text_encoder = {place} needs a package: pip install transformers") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.model, self.tokenizer = _found(transformers, place)
        except InputError:
            raise
        except Exception as error:  # files, network and formats fail in ways without a common type
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{_cant(place)}: {why.rstrip(':.')}") from None
        self.model.to(self.device)
        self.most: int | None = getattr(self.model.config, "max_position_embeddings", None)
        self.cache: OrderedDict[str, Tensor] = OrderedDict()
        self.cached_bytes = 0
        self.width = self.features(PROBE).shape[1]
        self.sha256 = self._sha256()

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text.casefold(), verbose=False)["input_ids"]

    def features(self, text: str) -> Tensor:
        """A text -> [tokens, width], on the host."""
        if text in self.cache:
            self.cache.move_to_end(text)
            return self.cache[text]
        ids = torch.tensor([self.tokens(text)], device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].cpu()
        self.cache[text] = found
        self.cached_bytes += found.nbytes
        while self.cached_bytes > CACHE_BYTES and len(self.cache) > 1:
            self.cached_bytes -= self.cache.popitem(last=False)[1].nbytes
        return found

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest.update(json.dumps([vocabulary, self.tokens(PROBE)]).encode())
        return digest.hexdigest()


def _cant(place: str) -> str:
    return f"model.text_encoder = {place} can't be used"


def _found(transformers: Any, place: str) -> tuple[torch.nn.Module, Any]:
    """What is here already, without asking the network; else downloaded."""
    if Path(place).is_dir():
        return _load(transformers, place, local_files_only=True)
    try:
        return _load(transformers, place, local_files_only=True)
    except OSError:
        return _load(transformers, place, local_files_only=False)


def _load(transformers: Any, place: str, local_files_only: bool) -> tuple[torch.nn.Module, Any]:
    """(the encoder in eval mode and float32, its tokenizer)."""
    if Path(place).is_dir() and not any(Path(place).glob("*.safetensors")):
        raise InputError(f"{_cant(place)}: there is no .safetensors file in it (pickles are not read)")
    how = {"local_files_only": local_files_only, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(place, **how)
    if config.model_type not in CLASSES:
        raise InputError(f"{_cant(place)}: it is of type {config.model_type}; wanted one of {', '.join(CLASSES)}")
    kind = getattr(transformers, CLASSES[config.model_type])
    model, told = kind.from_pretrained(
        place,
        use_safetensors=True,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=local_files_only,
    )
    if lacking := sorted(told["missing_keys"]):  # these would be random
        raise InputError(f"{_cant(place)}: its weights lack {lacking[0]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, **how)
    return model.float().eval().requires_grad_(False), tokenizer


@lru_cache(maxsize=2)
def open_encoder(place: str, device: str) -> FrozenEncoder:
    """Loaded once in a process."""
    return FrozenEncoder(place, device)
