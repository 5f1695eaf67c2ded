import pytest

from qinvert.cli.data_options import DataOptions
from qinvert.cli.verbs import load_verb
from qinvert.model_options import Device, Dtype
from qinvert.pretrained import Loading


@pytest.mark.parametrize(("option", "kind"), [("device", Device), ("dtype", Dtype)])
def test_what_can_be_typed_is_what_python_takes(option, kind):
    (found,) = [each for each in load_verb("calibrate").params if each.name == option]
    assert list(found.type.choices) == list(kind)
    assert found.default == getattr(Loading(), option) == getattr(DataOptions(), option)
