"""What may outgrow memory: JSON files read a piece at a time, and lists that are kept on disk."""

import array
import json
import tempfile

import ijson

from experiment import UserError


def pieces(path):
    """Yields (key, value) of the JSON file at `path`, a piece at a time.

    Of an outermost list each element, the key None; of an outermost object each value, and where that is a list each
    of its elements, one by one under the same key; of anything else nothing.
    Raises UserError where the file is not JSON, OSError where it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            # Not ijson.items: the prefix it keeps for each event takes gigabytes on a deeply nested file.
            events, key = ijson.basic_parse(file, use_float=True), None
            outermost, _ = next(events)
            for event, value in events:
                if event == "map_key":
                    key = value
                elif event == "start_array" and outermost == "start_map":
                    for event, value in events:
                        if event == "end_array":
                            break
                        yield key, _build(event, value, events)
                elif event not in ("end_array", "end_map"):
                    yield key, _build(event, value, events)
        except ijson.JSONError as error:
            raise UserError(f"{path}: is not JSON ({str(error).splitlines()[0].strip()})") from None


def _build(event, value, events):
    """The value that begins with this event; takes what else belongs to it from `events`."""
    builder, depth = ijson.ObjectBuilder(), 0
    while True:
        builder.event(event, value)
        depth += event.startswith("start_") - event.startswith("end_")
        if depth == 0:
            return builder.value
        event, value = next(events)


class Spool:
    """A list of JSON values that grows on disk, in a file without a name that ends with the process. In memory are the
    places of the values (8 bytes each) and the first megabyte."""

    def __init__(self):
        self._file = tempfile.SpooledTemporaryFile(max_size=2**20)
        self._ends = array.array("q", [0])

    def __len__(self):
        return len(self._ends) - 1

    def append(self, value):
        line = json.dumps(value).encode()
        try:
            self._file.seek(self._ends[-1])
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise UserError(f"{folder}: cannot be written ({error.strerror}): make room, or set TMPDIR") from None
        self._ends.append(self._ends[-1] + len(line))

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        self._file.seek(self._ends[number])
        return json.loads(self._file.read(self._ends[number + 1] - self._ends[number]))
