"""What users catch: one base, and beside it the built-in class that fits."""

import pytest

import gossamer as gs


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (gs.ConfigurationError, ValueError),
        (gs.OrderError, RuntimeError),
        (gs.StateError, ValueError),
        (gs.DataError, RuntimeError),
        (gs.NonFiniteError, ArithmeticError),
    ],
)
def test_error_is_caught_as_ours_and_as_the_builtin(error, builtin):
    for kind in (gs.GossamerError, builtin, error):
        with pytest.raises(kind, match="what and where"):
            raise error("what and where")


def test_kinds_of_errors_do_not_catch_each_other():
    kinds = [gs.ConfigurationError, gs.OrderError, gs.StateError, gs.DataError, gs.NonFiniteError]
    assert all(not issubclass(a, b) for a in kinds for b in kinds if a is not b)
