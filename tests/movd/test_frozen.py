import pytest
import torch
from safetensors.torch import load_file

from tests.support import movd_frozen as frozen


@pytest.fixture(scope="module")
def computed():
    return frozen.compute()


@pytest.mark.parametrize("name", sorted(load_file(frozen.PATH)))
def test_the_models_compute_what_they_did_when_they_agreed_with_the_originals(computed, name):
    torch.testing.assert_close(computed[name], load_file(frozen.PATH)[name], atol=2e-4, rtol=1e-5)


def test_nothing_is_computed_that_is_not_frozen(computed):
    assert computed.keys() == load_file(frozen.PATH).keys()
