"""Damage to single records of a prepared set, as a bad disk leaves it."""

from array_record.python import array_record_data_source


def spoil(directory, split, rows):
    """Overwrite some bytes of stored examples; their checksums no longer hold."""
    places = []
    for file in sorted(directory.glob(f"*-{split}.*")):
        source = array_record_data_source.ArrayRecordDataSource([file])
        places += [(file, source[number]) for number in range(len(source))]
    for row in rows:
        file, record = places[row]
        content = bytearray(file.read_bytes())
        # Records are stored as they are; only the end of an image is not what others have too.
        pixels = record[-70:-50]
        assert content.count(pixels) == 1
        at = content.index(pixels)
        content[at : at + 20] = bytes(value ^ 255 for value in pixels)
        file.write_bytes(content)
