"""Words that are mistyped, and what was probably meant."""

from __future__ import annotations

import pytest

from wherefrom.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["atribute", "--model", "m"], "invalid choice: 'atribute'"),
        (["attribute", "--model", "m", "--quik"], "unrecognized arguments: --quik"),
        (["compare", "--metod=trak"], "unrecognized arguments: --metod"),
        (["report", "run", "--titel", "x"], "unrecognized arguments: --titel"),
        (["methods", "--xyzzy"], "unrecognized arguments: --xyzzy"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    meant = {"atribute": "attribute", "--quik": "--quick", "--metod=trak": "--method", "--titel": "--title"}
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    expected = next((f"Did you mean {meant[word]}?" for word in words if word in meant), None)
    assert expected is None or expected in error
    assert expected is not None or "Did you mean" not in error
