import inspect

from latentrt.engines import errors


def classes() -> dict[str, type[errors.LatentrtError]]:
    found = dict(inspect.getmembers(errors, inspect.isclass))
    return {name: kind for name, kind in found.items() if issubclass(kind, errors.LatentrtError)}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line.strip(" │├└─") for line in (errors.__doc__ or "").splitlines() if "Error" in line][1:]
    table = {line.split()[0]: line.split() for line in drawn}
    assert set(table) == set(classes()) - ({"LatentrtError"} - set(table))
    for name, words in table.items():
        assert str(classes()[name].exit_code) in words[:5], name


def test_a_message_has_found_expected_and_fix() -> None:
    error = errors.UsageError("a is 3", expected="b", fix="Do c.")
    assert (error.found, error.expected, error.fix) == ("a is 3", "b", "Do c.")
    assert str(error) == "a is 3; expected b. Do c."


def test_the_advice_fits_the_package() -> None:
    assert "--dtype fp32" in errors.numeric_fix("fp16")
    assert "--dtype" not in errors.numeric_fix("fp32")
    assert "damaged" in errors.numeric_fix("fp32")
