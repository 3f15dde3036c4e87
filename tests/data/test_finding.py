from rankjax.data import finding


def test_places_name_file_and_columns():
    assert finding.place("items", "birth") == 'items.arrow, column "birth"'
    assert finding.place("events", "a", "b") == 'events.arrow, columns "a", "b"'


def test_counts_are_told_with_their_share():
    assert finding.of(12, 3400, "events") == "12 of 3,400 events (0.353%)"
    assert finding.of(0, 0, "events") == "0 of 0 events (0%)"
