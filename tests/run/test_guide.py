"""The code of docs/write-a-pipeline.md is what `blockstream plugins new --kind pipeline` writes.

What that does is tested where packages are built and installed: it streams, resumes and is identified.
"""

import re

from blockstream.cli.plugin_templates import files_of
from tests.support.imports import ROOT


def test_the_code_of_the_guide_is_the_code_that_is_written_and_tested():
    page = (ROOT / "docs" / "write-a-pipeline.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL))
    written = files_of("towers", "pipeline")
    assert shown == {name: written[name] for name in shown} and len(shown) == 2
    assert set(shown) == {name for name in written if name.endswith(".py") and not name.startswith("tests/")}
