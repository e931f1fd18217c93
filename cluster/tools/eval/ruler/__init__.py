"""RULER's tasks made offline: what they hide and ask, how answers score, tables, pictures and exported files.

Task texts, sizes and scores follow https://github.com/NVIDIA/RULER (Apache-2.0), commit c3f5e3b. Three things differ,
because nothing is downloaded: the text to hide in is the King James Bible, words come from the needle checkpoint's list
and from that text, and the question task has facts of its own and is named `qa_synthetic`.
"""
