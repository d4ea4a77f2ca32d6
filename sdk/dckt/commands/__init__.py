"""Commands of ``dckt`` that have a module of their own."""
