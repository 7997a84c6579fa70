"""The demo: a page in the browser that generates, restores, translates, augments, and compares.

What the page does are functions of tensors (`actions`, `uploads`), and `page` wires them to gradio.
"""
