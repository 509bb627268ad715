"""A user without rights opens folders of results to write into them: without_rights.py FOLDER ..."""

import os
import pathlib
import sys

from benchmarks.study import files

if os.geteuid() == 0:
    os.setuid(65534)
settings = {"name": "x", "precision": 64, "cells": [], "versions": {}, "system": {}}
for folder in map(pathlib.Path, sys.argv[1:]):
    try:
        with files.open_folder(folder, settings):
            print("opened")
    except files.FolderError as error:
        print(error)
