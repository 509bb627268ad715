"""Fingerprints of a test file's objects, as JSON: fingerprints.py NAME FILE."""

import importlib.util
import json
import sys

import jax

jax.config.update("jax_enable_x64", True)
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
print(json.dumps(module.all_fingerprints()))
