"""utils/prompts.py: invalid prompt files are rejected, and every prompt gets a safe and distinct file name."""

import pytest

from utils.errors import UserError
from utils.prompts import Prompt, clean_prompt, file_stem, read_prompts, unique_stems

UNSAFE = {
    "traversal": "../../etc/passwd",
    "separators": "a/b\\c",
    "dot": ".",
    "dots": "..",
    "hidden": ".hidden cat",
    "option": "-rf cat",
    "only separators": "///",
    "reserved": 'a sign saying: "what?" <b>|*',
    "control": "a\tcat\x00with\x1b[31m red\x7f",
    "right-to-left override": "cat\u202egpj.exe",
    "2000 words": "word " * 1999 + "end",
    "cjk": "一只猫在雪地里奔跑" * 40,
    "emoji": "a 🐱 on the moon 👩‍🚀",
    "many emoji": "👩‍🚀" * 200,
    "windows device": "CON",
}


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(index, name, name) for index, name in enumerate(names)]


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n   \n a dog \u2028 runs\n\u3000\n".encode())
    assert read_prompts(file) == [Prompt(0, "a cat", "a cat"), Prompt(1, "a dog \u2028 runs", "a dog \u2028 runs")]


def test_extended_prompts_replace_the_text_but_not_the_name(tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a cat\n\na dog\n")
    long.write_text("a fluffy cat\n\na quick dog\n\n")
    assert read_prompts(short, long) == [Prompt(0, "a fluffy cat", "a cat"), Prompt(1, "a quick dog", "a dog")]


def test_a_different_number_of_extended_prompts_is_an_error_with_both_counts(tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a cat\na dog\n")
    long.write_text("a fluffy cat\n\na\nb\n")
    with pytest.raises(UserError, match=r"short\.txt has 2 lines.*long\.txt has 4"):
        read_prompts(short, long)


def test_extended_prompts_are_paired_by_line(tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a cat\n\na dog\n")
    long.write_text("a fluffy cat\na quick dog\n\n\n")
    with pytest.raises(UserError, match=r"has 3 lines.*has 2"):
        read_prompts(short, long)
    long.write_text("a fluffy cat\na quick dog\nmore\n")
    with pytest.raises(UserError, match=r"line 2 is blank in \S*short\.txt but not in \S*long\.txt"):
        read_prompts(short, long)
    with pytest.raises(UserError, match=r"line 2 is blank in \S*short\.txt but not in \S*long\.txt"):
        read_prompts(long, short)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_prompts_is_an_error(tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(file)


def test_unreadable_files_are_errors_that_name_them(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read_prompts(latin)
    with pytest.raises(UserError, match=r"missing\.txt: No such file"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="directory"):
        read_prompts(tmp_path)


def test_plain_prompts_keep_their_text_as_name():
    (prompt,) = prompts("A red circle, moving right -- fast (on blue); it's 5% café 🐱")
    assert file_stem(prompt, 3) == f"{prompt.name}-3"
    assert file_stem(prompt, 3, save_with_index=True) == "0-3"


@pytest.mark.parametrize("name", UNSAFE.values(), ids=UNSAFE.keys())
def test_unsafe_prompts_get_safe_file_names(tmp_path, name):
    stem = file_stem(prompts(name)[0], 12)
    file = tmp_path / f"{stem}.mp4"
    file.touch()
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert len(stem.encode()) <= 200
    assert stem == stem.encode().decode()
    assert not stem.startswith((".", "-", " ")) and stem.endswith("-12")
    assert not set(stem) & set('<>:"/\\|?*') and stem.replace("\u200d", "").isprintable()
    assert " ".join(stem.split()) == stem


def test_shortened_and_changed_prompts_stay_distinct():
    long = "word " * 2000
    names = [file_stem(p, 0) for p in prompts(long + "a", long + "b", "a/b", "a\\b", "a:b", ".", "..")]
    assert len(set(names)) == len(names)


def test_all_names_of_a_run_are_distinct_even_if_case_is_ignored():
    colliding = file_stem(prompts("a/b")[0], 0).removesuffix("-0")  # a prompt that equals the safe name of another
    names = ["a cat", "a cat", "A Cat", "a cat (2)", "a/b", colliding, "caf\u00e9", "cafe\u0301", *UNSAFE.values()] * 2
    stems = unique_stems(prompts(*names), num_samples=3)
    flat = [stem.casefold() for samples in stems for stem in samples]
    assert len(flat) == 3 * len(names) == len(set(flat))
    assert max(len(stem.encode()) for stem in flat) <= 200
    assert stems[0] == ["a cat-0", "a cat-1", "a cat-2"]
    assert stems[1] == ["a cat (2)-0", "a cat (2)-1", "a cat (2)-2"]


def test_names_do_not_depend_on_later_prompts_or_on_the_number_of_samples():
    names = ["a", "a", "b", "A", "a"]
    few, many = unique_stems(prompts(*names[:3]), 1), unique_stems(prompts(*names), 4)
    assert [samples[:1] for samples in many[:3]] == few


def test_indexed_names():
    assert unique_stems(prompts("a", "a"), 2, save_with_index=True) == [["0-0", "0-1"], ["1-0", "1-1"]]


def test_clean_prompt_equals_wans():
    assert clean_prompt("  a cat &amp;amp; a\n\tdog\u00a0 ") == "a cat & a dog"
    assert clean_prompt("cafÃ© “quoted”") == 'café "quoted"'
