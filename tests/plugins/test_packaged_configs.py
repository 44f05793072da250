"""A package brings configs of any name a file can have, in a wheel as its author builds it."""

import json

from tests.support.wheels import blockstream, build, install, remove

PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "blockstream-leaps"
version = "0.1.0"

[project.entry-points."blockstream.examples"]
"leaps-fast.yaml" = "blockstream_leaps.configs"
"leaps.2-slow.yaml" = "blockstream_leaps.configs"

[tool.setuptools]
packages = ["blockstream_leaps", "blockstream_leaps.configs"]

[tool.setuptools.package-data]
"blockstream_leaps.configs" = ["*.yaml"]
"""


def test_configs_with_a_hyphen_and_a_dot_are_found_in_an_installed_wheel(tmp_path):
    source, site = tmp_path / "leaps", tmp_path / "site"
    configs = source / "blockstream_leaps" / "configs"
    configs.mkdir(parents=True)
    site.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "blockstream_leaps" / "__init__.py").touch()
    names = ["leaps-fast.yaml", "leaps.2-slow.yaml"]
    for name in names:
        (configs / name).write_text("pipeline: nobody\n")
    (wheel,) = build([source], tmp_path / "built")
    install(wheel, site)
    listed = json.loads(blockstream("plugins", "--json", site=site, cwd=tmp_path).stdout)
    assert set(names) <= {example["name"] for example in listed["examples"]}
    for name in names:
        for written in (name, name.removesuffix(".yaml")):
            found = blockstream("schema", written, site=site, cwd=tmp_path)
            assert f"{name}: the example packaged in blockstream-leaps 0.1.0" in found.stderr
            assert "no pipeline 'nobody'" in found.stderr
    remove(wheel, site)
    gone = blockstream("schema", names[0], site=site, cwd=tmp_path)
    assert gone.returncode == 2 and "no packaged example has that name" in gone.stderr
