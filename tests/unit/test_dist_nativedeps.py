"""CMake files read for what they fetch: the forms that upstream's files have, in words of our own."""

from __future__ import annotations

import json

import pytest
from vllm_patches.dist.nativedeps import asset, is_cmake, parse, read_dependencies
from vllm_patches.errors import PatchesError

ROOT = """\
# FetchContent_Declare(commented GIT_REPOSITORY no GIT_TAG no)
#[[ FetchContent_Declare(
bracketed GIT_REPOSITORY no GIT_TAG no) ]]
set(STONE_REVISION "v1.2")
message("not a FetchContent_Declare(text GIT_REPOSITORY no GIT_TAG no)")
if(LANGUAGE STREQUAL "CUDA" AND (A OR B))
  if (DEFINED ENV{STONE_DIR})
    set(STONE_DIR $ENV{STONE_DIR})
  endif()
  if(STONE_DIR)
    FetchContent_Declare(stone SOURCE_DIR ${STONE_DIR})
  else()
    FetchContent_Declare(
      stone
      GIT_REPOSITORY https://example.invalid/stone.git
      GIT_TAG ${STONE_REVISION}  # in sync
      GIT_SUBMODULES "third/a" "third/b"
      GIT_SHALLOW TRUE
    )
  endif()
endif()
"""
OTHERS = """\
if(DEFINED ENV{LIME_ROOT} AND IS_DIRECTORY "$ENV{LIME_ROOT}")
  message(STATUS "given")
else()
  FetchContent_Populate(lime
    SUBBUILD_DIR "${X}/sub"
    SOURCE_DIR "${X}/lime-src"
    GIT_REPOSITORY https://example.invalid/lime.git
    GIT_TAG abc
    SOURCE_SUBDIR python/lime)
endif()
set(FETCHCONTENT_SOURCE_DIR_CHALK "$ENV{FETCHCONTENT_SOURCE_DIR_CHALK}" CACHE PATH "chalk")
if(FETCHCONTENT_SOURCE_DIR_CHALK)
  FetchContent_Declare(chalk SOURCE_DIR ${FETCHCONTENT_SOURCE_DIR_CHALK})
elseif(ARM)
  FetchContent_Declare(chalk GIT_REPOSITORY https://example.invalid/chalk.git GIT_TAG one)
else()
  FetchContent_Declare(chalk GIT_REPOSITORY https://example.invalid/chalk.git GIT_TAG two)
endif()
FetchContent_Declare(sand GIT_REPOSITORY https://example.invalid/sand.git GIT_TAG three)
"""
FILES = {"CMakeLists.txt": ROOT, "cmake/others.cmake": OTHERS}


def test_every_form() -> None:
    found = {(one.name, one.revision): one for one in read_dependencies(FILES)}
    assert list(found) == [("stone", "v1.2"), ("lime", "abc"), ("chalk", "one"), ("chalk", "two"), ("sand", "three")]
    stone = found["stone", "v1.2"]
    assert (stone.repository, stone.submodules) == ("https://example.invalid/stone.git", ("third/a", "third/b"))
    assert (stone.variable, stone.how, stone.declared) == ("STONE_DIR", "environment", "CMakeLists.txt:13")
    assert stone.when == ("LANGUAGE STREQUAL CUDA AND ( A OR B )",)
    lime = found["lime", "abc"]
    assert (lime.variable, lime.how, lime.subdirectory, lime.when) == ("LIME_ROOT", "environment", "python/lime", ())
    assert found["chalk", "one"].variable == "FETCHCONTENT_SOURCE_DIR_CHALK"
    assert found["chalk", "one"].when == ("ARM",)
    assert found["chalk", "two"].when == ("NOT (ARM)",)
    assert found["chalk", "two"].how == "environment"


def test_without_a_word_in_the_files_cmakes_own_variable_does() -> None:
    sand = read_dependencies(FILES)[-1]
    assert (sand.variable, sand.how) == ("FETCHCONTENT_SOURCE_DIR_SAND", "cmake -D, or CMAKE_ARGS")


def test_a_variable_with_two_values_is_not_guessed() -> None:
    files = {"CMakeLists.txt": ROOT + 'set(STONE_REVISION "v9")\n'}
    assert read_dependencies(files)[0].revision == "${STONE_REVISION}"


def test_the_asset(world) -> None:  # type: ignore[no-untyped-def]
    record = json.loads(asset(world.release(), FILES).data)
    assert record["release"] == "0.20.2"
    assert record["dependencies"][0] == {
        "name": "stone",
        "repository": "https://example.invalid/stone.git",
        "revision": "v1.2",
        "submodules": ["third/a", "third/b"],
        "local_copy": {"variable": "STONE_DIR", "given_by": "environment"},
        "declared": "CMakeLists.txt:13",
        "when": ["LANGUAGE STREQUAL CUDA AND ( A OR B )"],
    }


@pytest.mark.parametrize("files", [{}, {"CMakeLists.txt": "project(x)\n"}])
def test_none_at_all_is_an_error(files: dict[str, str]) -> None:
    with pytest.raises(PatchesError) as caught:
        read_dependencies(files, "0.20.2")
    assert caught.value.release == "0.20.2"


def test_what_cannot_be_read_is_told_by_line() -> None:
    with pytest.raises(PatchesError) as caught:
        list(parse("CMakeLists.txt", 'set(A 1)\nset(B "open\n'))
    assert caught.value.file == "CMakeLists.txt:2"


def test_which_files() -> None:
    names = ["CMakeLists.txt", "cmake/a.cmake", "cmake/b/c.cmake", "csrc/CMakeLists.txt", "cmake/x.py", "x.cmake"]
    assert [name for name in names if is_cmake(name)] == names[:3]
