"""How the library is found and judged, that what is called is what the header says, and that a fork is survived."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import checks
import pytest
import torch

import pixmim
from pixmim import _library, ops

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = (ROOT / "capi" / "include" / "pixmim.h").read_text()


@pytest.fixture
def refusal(monkeypatch):
    """What loading this library raises."""

    def load(library: Path) -> str:
        monkeypatch.setenv("PIXMIM_LIBRARY", str(library))
        with pytest.raises(ImportError, match=r"^pixmim: ") as raised:
            _library.load()
        return str(raised.value)

    return load


def test_a_missing_library_is_named_with_the_cure(tmp_path, refusal):
    message = refusal(tmp_path / "libpixmim.so")
    assert str(tmp_path) in message
    assert "cargo build --release -p pixmim-capi" in message and "PIXMIM_LIBRARY" in message


def test_a_file_that_is_no_library_is_refused(tmp_path, refusal):
    (tmp_path / "libpixmim.so").write_text("no library")
    assert "no libpixmim that loads" in refusal(tmp_path / "libpixmim.so")


@pytest.mark.parametrize(("major", "minor"), [(_library.ABI[0] + 1, 0), (_library.ABI[0] - 1, 9)])
def test_a_library_of_another_abi_is_refused(tmp_path, refusal, major, minor):
    (tmp_path / "other.c").write_text(f"unsigned pixmim_abi_version(void) {{ return {major}u << 16 | {minor}u; }}")
    library = tmp_path / "libpixmim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    message = refusal(library)
    assert f"has ABI {major}.{minor}" in message and "cargo build" in message


def constant(name: str) -> int:
    return int(re.search(rf"#define PIXMIM_{name} (-?\d+)", HEADER)[1])


def test_constants_are_the_headers():
    assert _library.ABI[0] == constant("ABI_MAJOR") and _library.ABI[1] <= constant("ABI_MINOR")
    names = {"F32": "float32", "BF16": "bfloat16", "F64": "float64", "U8": "uint8", "I32": "int32", "I64": "int64"}
    assert {getattr(torch, there): constant(here) for here, there in names.items()} == _library.DTYPES
    assert _library.MAX_DIMS == constant("MAX_DIMS")


@pytest.mark.parametrize(
    ("struct", "name"), [(_library.TensorView, "pixmim_tensor"), (_library.ContextOptions, "pixmim_context_options")]
)
def test_structs_are_the_headers(struct, name):
    body = re.search(rf"typedef struct {name} {{(.*?)}}", HEADER, re.DOTALL)[1]
    fields = re.findall(r"^\s*(\w+) (\*?)(\w+)(\[\w+\])?;", body, re.MULTILINE)
    kinds = {"uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
    found = [
        (field, ctypes.c_void_p if pointer else kinds[kind] * _library.MAX_DIMS if array else kinds[kind])
        for kind, pointer, field, array in fields
    ]
    assert found == struct._fields_


def test_functions_take_what_the_header_says():
    letters = {
        "const struct pixmim_tensor *": "t",
        "int64_t ": "l",
        "uint64_t ": "u",
        "int32_t ": "i",
        "double ": "d",
        "const double *": "v",
        "const struct pixmim_filter *": "p",
    }
    functions = [value for value in vars(ops).values() if isinstance(value, _library.Function)]
    assert len(functions) == 7
    for function in functions:
        name = function.function.__name__
        arguments = re.search(rf"pixmim_status {name}\((.*?)\);", HEADER, re.DOTALL)[1].split(",")
        first, *arguments, last = [re.sub(r"\w+$", "", " ".join(argument.split())) for argument in arguments]
        assert (first, last) == ("const struct pixmim_context *", "void *")
        scratch = ["void *", "size_t *"]
        has_workspace = arguments[-2:] == scratch
        kinds = [_library.Function.KINDS[letters[argument]] for argument in arguments[: -2 * has_workspace or None]]
        assert function.workspace == has_workspace
        assert function.function.argtypes[1 : len(kinds) + 1] == kinds
        assert len(function.function.argtypes) == len(kinds) + 2 + 2 * has_workspace


def test_an_error_bears_the_librarys_status_and_sentence():
    with pytest.raises(pixmim.PixMIMError, match=r"^pixmim: .*`target` has shape \[1, 2, 3\], expected ") as raised:
        pixmim.masked_mse_loss(torch.ones(1, 2, 4), torch.ones(1, 2, 3))
    assert raised.value.status == constant("SHAPE")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    qkv = checks.randn("cpu", 3, 65, 3 * 32, dtype=torch.float32)
    before = pixmim.attention(qkv, 2)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(pixmim.attention(qkv, 2), before) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(pixmim.attention(qkv, 2), before)


def test_kept_sizes_do_not_grow_without_end():
    kept = ops._attention_forward.bytes
    most, _library.MOST_KEPT = _library.MOST_KEPT, 3
    try:
        for tokens in range(1, 12):
            pixmim.attention(torch.ones(1, tokens, 24), 1)
            assert len(kept) <= max(3, 1) or tokens == 1
    finally:
        _library.MOST_KEPT = most
