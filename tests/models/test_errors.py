from models.errors import nearest, unknown_name


def test_nearest_also_looks_into_nested_names() -> None:
    assert nearest("wrokers", ["workers", "rl.lr", "seed"]) == "workers"
    assert nearest("lr", ["workers", "rl.lr", "seed"]) == "rl.lr"


def test_an_unknown_name_offers_the_nearest_or_all() -> None:
    assert str(unknown_name("job", "resaon", ["reason", "sft"])) == "unknown job `resaon`: did you mean `reason`?"
    assert str(unknown_name("job", "xyz", ["reason", "ab"])) == "unknown job `xyz`: use ab, reason"
