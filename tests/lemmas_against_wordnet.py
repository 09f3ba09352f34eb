"""How often vad.py's lemmas are WordNet's, on the 10,000 most frequent English words. A program for people:

    python tests/lemmas_against_wordnet.py

It needs `wordfreq` (PyPI) for the words and WordNet's dictionary (Debian's `wordnet`), both for measuring only.

The authors tag a word's part of speech and give both to NLTK's WordNetLemmatizer. `WordNet.answers` follows it for every
part of speech: the exception list if the word is on it, else the word itself and what the suffix rules make of it, as far
as they are base forms, the rules again if none is. A lemma is right if it is one of these answers that the lexicon knows;
where the lexicon knows none of them, nothing is the only right answer. So a base form that the lexicon lacks may not
become another word ("number" is not "numb"), and any part of speech counts ("going" may be "go").
"""
import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from vad import Lexicon

DICTIONARY = Path("/usr/share/wordnet")
SUBSTITUTIONS = {  # of WordNet's morphy, in its order
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y", "adv": "", "adj": "er: est: er:e est:e",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
}
TRAPS = {"aft", "eve", "numb", "ski", "doe", "bee", "nothing", "putt", "sett", "caste", "cast", "suite", "suit", "other",
         "form", "latte"}
TRAPPED = {"be", "do", "after", "ever", "number"}


class WordNet:
    def __init__(self, folder: Path = DICTIONARY):
        self.bases, self.exceptions, self.rules = {}, {}, {}
        for kind, rules in SUBSTITUTIONS.items():
            lines = (folder / f"index.{kind}").read_text().splitlines()
            self.bases[kind] = {line.split(" ")[0] for line in lines if line[0] != " "}  # the licence stands on top
            self.exceptions[kind] = defaultdict(list)
            for form, *bases in map(str.split, (folder / f"{kind}.exc").read_text().splitlines()):
                self.exceptions[kind][form] += bases
            self.rules[kind] = [rule.split(":") for rule in rules.split()]

    def morphy(self, word: str, kind: str) -> set[str]:
        """The base forms of a word as one part of speech."""
        if word in self.exceptions[kind]:
            return {word, *self.exceptions[kind][word]} & self.bases[kind]
        forms = self.stripped({word}, kind)
        found = (forms | {word}) & self.bases[kind]
        while forms and not found:
            forms = self.stripped(forms, kind)
            found = forms & self.bases[kind]
        return found

    def stripped(self, words: set[str], kind: str) -> set[str]:
        return {word.removesuffix(old) + new for word in words for old, new in self.rules[kind] if word.endswith(old)}

    def answers(self, word: str) -> set[str]:
        return {base for kind in self.bases for base in self.morphy(word, kind)}

    def words(self) -> list[str]:
        """Every base form that is a single word."""
        return sorted(base for base in set().union(*self.bases.values()) if "_" not in base)


def frequent_words(count: int = 10_000) -> list[str]:
    from wordfreq import top_n_list
    return [word for word in top_n_list("en", 2 * count) if word.isascii() and word.isalpha()][:count]


def lexicons(words: list[str], seed: int) -> dict[str, set[str]]:
    """Three lexicons made of WordNet's base words."""
    some, others = (set(random.Random(2 * seed + i).sample(words, len(words) * 6 // 10)) for i in range(2))
    return {"all": set(words), "60%": some, "60% with traps": (others | TRAPS) - TRAPPED}


def mistakes(words: list[str], known: set[str], wordnet: WordNet) -> list[tuple[str, str | None, set[str]]]:
    """The words with a wrong lemma: word, our lemma, the right ones."""
    lexicon, found = Lexicon(dict.fromkeys(known, 1), None, 0, ""), []
    for word in words:
        ours, right = lexicon.lemma(word), wordnet.answers(word) & known
        if ours not in (right or {None}):
            found.append((word, ours, right))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the lemmas of vad.py with WordNet's.")
    parser.add_argument("--seeds", type=int, default=5, help="random lexicons of each kind")
    parser.add_argument("--show", type=int, default=25, help="mistakes to show, most frequent words first")
    options = parser.parse_args()
    wordnet, words = WordNet(), frequent_words()
    shares, wrong = defaultdict(list), defaultdict(list)
    for seed in range(options.seeds):
        for name, known in lexicons(wordnet.words(), seed).items():
            found = mistakes(words, known, wordnet)
            shares[name].append(1 - len(found) / len(words))
            for word, ours, right in found:
                wrong[word].append(f"{name}: {ours or 'nothing'}, WordNet: {' or '.join(sorted(right)) or 'nothing'}")
    print(f"{len(words):,} words, {options.seeds} lexicons of each kind: share of lemmas as WordNet's (mean, worst)")
    for name, values in shares.items():
        print(f"  {name:16}{sum(values) / len(values):.2%}  {min(values):.2%}")
    print("the most frequent words that were wrong:")
    for word in [word for word in words if word in wrong][:options.show]:
        print(f"  {word:16}{len(wrong[word])} of {3 * options.seeds} times, first in {wrong[word][0]}")


if __name__ == "__main__":
    main()
