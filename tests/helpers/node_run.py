"""Runs the pages' ES modules under node, as the browser would: values in as JSON, arrays as files, JSON out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common import ROOT

STATIC = ROOT / "src" / "leanvit" / "web" / "static"
PAGE = ROOT / "src" / "leanvit" / "serve" / "page"

START = """
import fs from "node:fs";
const given = JSON.parse(fs.readFileSync("given.json", "utf8"));
const KINDS = { u1: Uint8Array, f4: Float32Array, i8: BigInt64Array };
const array = (name) => {
  const { kind, dims } = given.arrays[name];
  const bytes = fs.readFileSync(`${name}.raw`);
  return { data: new KINDS[kind](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), dims };
};
const picture = (name) => {
  const { data, dims } = array(name);
  return { data, height: dims[0], width: dims[1], step: dims[2] };
};
const save = (name, data) => fs.writeFileSync(`${name}.raw`, data);
const tell = (values) => fs.writeFileSync("told.json", JSON.stringify(values));
"""
"""What the code of a test finds: given.values, array(name), picture(name), save(name, bytes), tell(values)."""


def required_tool(name: str, package: str) -> str:
    """Path of a program; without it the test fails where CI has promised it, and is skipped elsewhere."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed. Run: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


class Node:
    """A folder with the modules of both pages, in which code is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for modules in (STATIC, PAGE):
            shutil.copytree(modules, folder, dirs_exist_ok=True)
        (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")

    def run(self, code: str, values: Any = None, **arrays: NDArray[Any]) -> Any:
        """What the code tells."""
        kinds = {}
        for name, data in arrays.items():
            np.ascontiguousarray(data).tofile(self.folder / f"{name}.raw")
            kinds[name] = {"kind": data.dtype.str[1:], "dims": list(data.shape)}
        given = {"values": values, "arrays": kinds}
        (self.folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
        (self.folder / "main.js").write_text(START + code, encoding="utf-8")
        command = [required_tool("node", "nodejs"), "main.js"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((self.folder / "told.json").read_text(encoding="utf-8"))

    def saved(self, name: str) -> NDArray[np.uint8]:
        """Bytes that the code has saved."""
        return np.fromfile(self.folder / f"{name}.raw", np.uint8)
