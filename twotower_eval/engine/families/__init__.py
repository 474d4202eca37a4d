"""Families of diffusion language models besides the two-tower one: each a file on a shared base.

``backbone``: transformers' own decoder layers under masks of ours. ``canvas``: the base of families that read prompt
and answer together in every call. ``blocks``: the base of those that keep the prompt and finished blocks in a cache.
"""
