"""The report of a run: the values its pictures show (``data``, ``findings``), the pictures, and the page."""
