"""The table of layers in docs/architecture.md against what the sources include: only what stands in a lower layer."""
import os
import re
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INCLUDE = re.compile(r'^ *# *include "([^"/]+)/', re.M)


def layers():
    """{folder of src/, or kernels: number of its layer}."""
    found = {}
    with open(os.path.join(ROOT, "docs", "architecture.md"), encoding="utf-8") as file:
        for number, where in re.findall(r"^\| (\d+) \| ([^|]*) \|", file.read(), re.M):
            for folder in re.findall(r"`(?:src/)?(\w+)/`", where):
                found[folder] = int(number)
    return found


def sources():
    """(folder, path) of every C, C++ and CUDA source of the program."""
    for top in ("src", "kernels"):
        for folder, _, names in os.walk(os.path.join(ROOT, top)):
            parts = os.path.relpath(folder, ROOT).split(os.sep)
            where = "kernels" if top == "kernels" else parts[1] if len(parts) > 1 else "cli"  # src/main.c stands with src/cli
            for name in names:
                if name.endswith((".c", ".h", ".cu", ".cuh")):
                    yield where, os.path.join(folder, name)


class Layers(unittest.TestCase):
    def test_every_folder_has_a_layer(self):
        folders = {name for name in os.listdir(os.path.join(ROOT, "src")) if os.path.isdir(os.path.join(ROOT, "src", name))}
        self.assertEqual(set(layers()), folders - {"prep"} | {"kernels"})

    def test_includes_point_down(self):
        layer, seen = layers(), 0
        for folder, path in sources():
            with open(path, encoding="utf-8") as file:
                for other in INCLUDE.findall(file.read()):
                    if other in layer and other != folder:
                        seen += 1
                        self.assertLess(layer[other], layer[folder], f"{os.path.relpath(path, ROOT)} includes a file of {other}/")
        self.assertGreater(seen, 300)


if __name__ == "__main__":
    unittest.main()
