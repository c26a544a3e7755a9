"""What explore_ddpm.py does with a network: requests, work that is watched and stopped, results, the page.

A request becomes a command line of sample_ddpm.py, is checked by that script's own code, and drawn by its own pictures,
so that the page can show nothing that the command line would not make. Only `page` and `layout` import gradio.
"""
