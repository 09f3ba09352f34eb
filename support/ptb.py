"""The Penn Treebank tokens of the COCO caption evaluation: what its scorers see of a caption.

Stanford's PTBTokenizer (CoreNLP 3.4.1) is a lexer that takes the longest match of all its rules. Here the first match
counts, and the order of the alternatives in TOKEN makes it the longest. What none matches is dropped, as the evaluation
drops it afterwards: quotes, commas, single marks, emoji. Left out is what captions hardly contain: web and e-mail
addresses, telephone numbers, marks of scripts other than Latin, Greek and Cyrillic.
"""
import re
from functools import cache, lru_cache

BLANK = r"[ \t\u00a0\u2000-\u200a\u3000]"
QUOTE = "['’`‘‛]"
LETTER = r"[A-Za-zªµº\u00adÀ-ÖØ-öø-\u1fff\u2c00-\u2dff\u3041-\ud7ff\uf900-\ufdff\uff21-\uffdc]"
ALNUM = LETTER.replace("A-Z", "0-9A-Z")
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"  # "sad.The" is one word
SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of a slash
CLITIC = "(?:'(?i:[dms]|ll|re|ve)(?![A-Za-z])|’(?i:[dmns]|ll|re|ve))"
STOP = r"(?:\.(?=[,:;]))?"  # a full stop before another mark stays with its word
ABBREVIATION = (
    r"adj adm adv ala? alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif "
    r"capt cf cie cmdr col colo comdr conn corp cos? cpl ct dak dec dept det drs? ed\.d elec ens esq est "
    r"etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt "
    r"ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms msgr mt mtg natl neb nev nov oct "
    r"okla penn pfc ph ph\.d plc pres profs? p?ptes? p?ptys? pvt rd reps? rev rt sens? sept? seq sfc sgt "
    r"spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"
).replace(" ", "|")
SENTENCE_START = (
    r"A About According Additionally After An As At But Earlier He Her Here However If In It Last Many "
    r"More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Then There These They This We "
    r"When While What Yet You"
).replace(" ", "|")
TOKEN = rf"""
    [ ] | [A-Za-z]+(?=,?[ ]|$)                                                 # most of any text
  | [A-Za-z]*[A-MO-Za-mo-z](?=[nN]{QUOTE}[tT]) | [nN]{QUOTE}[tT](?![A-Za-z])   # do|n't
  | {WORD}(?={CLITIC}) | [yY]['’](?={LETTER})                                  # she|'s, y'|all
  | \d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}                                        # 24/12/1888
  | \d{{1,4}}[-\ \u00a0]\d{{1,4}}/\d{{1,4}} | {SIDE}(?:/{SIDE}){{1,2}}         # 2 1/2, and/or
  | [A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+(?!_|{ALNUM}){STOP}             # well-dressed, 3.5-inch
  | (?:[dloDLO]{QUOTE}(?={LETTER}))?{ALNUM}+(?:[-_‐‑]{ALNUM}+)+{STOP}          # déjà-vu
  | [A-HJ-XZn]{QUOTE}{LETTER}{{2,}} | [dlo]{QUOTE}{ALNUM}{{2,}}{STOP}          # O'Keeffe, o'clock
  | {LETTER}+[aeiouAEIOU]{QUOTE}[aeiouA-Z]{LETTER}*                            # ma'am
  | (?i:[djl]['’]|c'mon|cap['’]n|[eo]'er|ev'ry|li'l|ol['’]|somethin['’]|'tis|'twas)
  | ['’](?:[nN]['’]|(?i:cause|em|till?)|\d0[sS]|(?:[nN]|\d\d)(?={BLANK}|$))    # 'em, '90s
  | {CLITIC} | (?i:anti|pro)- | [A-Z]+(?:\$|(?:[&+][A-Z]+)+)                   # US$, AT&T
  | (?i:{ABBREVIATION})\.(?!{LETTER})                                          # mr., etc.
  | (?=[A-Z])(?i:ark|az|del|ill|la|mass|miss|ore|pa|tex|wash)\.(?!{LETTER})
  | (?i:art|ca|figs?|nos?|op|pp|prop)\.(?={BLANK}?[0-9])                       # no. 5
  | (?:[A-Za-z]\.)+[A-Za-z](?!{ALNUM})\.?                                      # u.s., a.m.
  | [A-Za-z]\.(?!{LETTER}|{BLANK}+(?=[A-Z])(?i:{SENTENCE_START}){BLANK})       # j. smith; not: and i. She
  | {WORD}{STOP} | [-+]?\d*(?:[.:,]\d+)+ | \d+(?:{LETTER}{ALNUM}*)?{STOP} | [-+]\d+   # 1,200, 1st
  | [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?![A-Za-z0-9]) | \([-=^]_[-=^]\) | [-=^]_[-=^]   # :-) and ^_^
  | </?[A-Za-z][^<>]*> | <<? | >>? | &(?:amp|apos|gt|lt|nbsp|quot|\#\d+); | \#{LETTER}+ | @[A-Za-z_]\w*
  | [?!]{{2,}} | -{{2,}} | \*+ | @+ | \#+ | _+ | [`‘’‛‹›“”«»„‚]{{2}}
  | [$%&+/=\\^|~()[\]{{}}¡-©¬®-´¶-¹¼-¿×÷‚„-‣‰-‸※‾-⁂⁄⁰-₎€℀-⅏⅓-⅞←-⯿]
"""
SPELLED = {
    "cannot": "can not", "gimme": "gim me", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me",
    "wanna": "wan na", "'tis": "'t is", "'twas": "'t was", "£": "#", "€": "$", "¤": "$", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&amp;": "&", "&gt;": ">", "&lt;": "<",
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    **dict.fromkeys(["``", "''", "--", "---", "----", "&apos;", "&nbsp;", "&quot;"], ""),  # dropped
}
QUOTES = str.maketrans(
    {"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''", "»": "''"})
SPELLED_QUOTES = re.compile("n[’‘‛]t|’(?:[dms]|ll|re|ve)|[`‘’‛‹›“”«»„‚]{2}")  # o’clock keeps its own


@lru_cache(maxsize=1 << 17)
def spell(token: str) -> str:
    """A token as the original writes it: lower case, brackets by name, quotes in ASCII; "" if it drops it."""
    token = token.lower().replace("\u00ad", "").strip()
    if SPELLED_QUOTES.fullmatch(token):
        token = token.translate(QUOTES)
    token = re.sub(r"\s", "\u00a0", token).replace("(", "-lrb-").replace(")", "-rrb-")  # "2 1/2" is one token
    return SPELLED.get(token, token)


@cache
def lexer() -> re.Pattern:
    return re.compile(TOKEN, re.VERBOSE)  # at first use: 60 ms that an import need not take


def tokenize(caption: str) -> str:
    """The caption as the COCO scorers see it: lower-cased tokens between blanks, without punctuation."""
    caption = re.sub("[\U00010000-\U0010ffff]", "\u200b", caption.replace("\n", " "))  # emoji part words
    return " ".join(filter(None, map(spell, lexer().findall(caption))))
