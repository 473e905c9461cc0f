"""The loss plot: a PNG comes out, half a last line is forgiven, anything else wrong is named."""
import importlib.util
import unittest

from support import FolderTest, tool

LINES = ['{"step": 1, "loss": 3.5, "lr": 1e-3}', '{"step": 2, "loss": 3.0}', '{"step": 2, "eval_loss": 3.1}']


@unittest.skipUnless(importlib.util.find_spec("matplotlib"), "no matplotlib, which only this tool needs")
class PlotLoss(FolderTest):
    def plot(self, text):
        return tool("plot_loss.py", self.write("metrics.jsonl", text), "-o", self.path("loss.png"))

    def test_a_run_gives_a_png(self):
        result = self.plot("\n".join(LINES) + "\n" + '{"step": 3, "lo')
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("2 steps, 1 evaluations", result.stdout)
        with open(self.path("loss.png"), "rb") as file:
            self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")

    def test_a_broken_line_is_named(self):
        self.assert_one_error(self.plot(LINES[0] + "\nbroken\n" + LINES[1] + "\n"), 3, "metrics.jsonl:2:")

    def test_metrics_without_a_loss_are_refused(self):
        self.assert_one_error(self.plot(""), 3, "no loss")

    def test_what_is_no_file_of_metrics_is_refused(self):
        self.write("data.h5", b"\x89HDF")
        for name in ("", "data.h5"):
            self.assert_one_error(tool("plot_loss.py", self.path(name), "-o", self.path("loss.png")), 3, "name the metrics.jsonl of a run")
        self.assert_one_error(tool("plot_loss.py", self.path("nowhere"), "-o", self.path("loss.png")), 3, "cannot read: No such file")


if __name__ == "__main__":
    unittest.main()
