"""Mathematics: problems, the MATH scorer and its workers."""
