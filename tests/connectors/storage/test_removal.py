"""What is removed may be looked at, and removed, by another at that moment: a command, or a call that was abandoned."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from connectors.storage.removal import remove_tree
from connectors.storage.shelf import Shelf


def shelf(folder: Path) -> Shelf:
    return Shelf(folder, budget=10, wanted_free_bytes=0)


def test_clones_are_listed_while_some_of_them_go(tmp_path: Path) -> None:
    kept, ended = shelf(tmp_path), threading.Event()
    stays = kept.begin_clone("trg-clone-stays", "p", ["data"], "a")

    def come_and_go() -> None:
        while not ended.is_set():
            kept.begin_clone("trg-clone-goes", "p", ["data"], "b")
            remove_tree(kept.clone_folder("trg-clone-goes"))

    with ThreadPoolExecutor() as pool:
        going = pool.submit(come_and_go)
        try:
            for _ in range(3_000):
                assert stays in kept.clones()
        finally:
            ended.set()
        going.result()


def test_a_tree_that_two_remove_at_once_is_gone_for_both(tmp_path: Path) -> None:
    for turn in range(20):
        tree = tmp_path / f"tree-{turn}"
        for place in range(60):
            (tree / f"{place}" / "inner").mkdir(parents=True)
            (tree / f"{place}" / "inner" / "file").touch()
        meeting = threading.Barrier(2)

        def remove(tree: Path = tree, meeting: threading.Barrier = meeting) -> bool:
            meeting.wait()
            remove_tree(tree)
            return tree.exists()

        with ThreadPoolExecutor() as pool:
            assert [one.result() for one in [pool.submit(remove), pool.submit(remove)]] == [False, False]
