//! Programs drawn from a grammar: typed, so that most cells run to their end, and ending by construction.
//!
//! A template is Python with holes (`statements.txt`, `expressions.txt`). What fills a hole has its type;
//! variables keep theirs over all cells, and what is assigned is clipped, so that nothing grows beyond
//! bounds. There is no `while` without a counter, and no recursion without a bound. What is not the same
//! in all versions of Python, or on 32 and 64 bits, isn't in the grammar: the order of sets, hashes,
//! addresses, sums of floats (compensated since 3.12), transcendental functions (the C library's),
//! `locals()`, reprs of types, what compressors and pickles look like, quotes in the holes of f-strings
//! (since 3.12), runs of blanks in texts that are wrapped, dates out of range, `OrderedDict`'s repr, numbers
//! of errors (the platform's).
//!
//! | hole | is |
//! |---|---|
//! | `$i $f $s $p $y $l $t $d $z $u $h` | an expression: int, float, str, bool, bytes, list of ints, list of strs, dict of str to int, set of ints, tuple of int and str, anything that can be shown |
//! | `$h_sized` | an expression that has a length: a list or a dict |
//! | `$I $F $S $Y $L $T $D $Z` | a variable of that type |
//! | `$n $w $k $e` | a small number, a word, a format of ints, a class of exceptions |
//! | `$G $C $O` | a function of two ints, a class, an instance |
//! | `$B` | one or two statements, indented as the hole is |
//! | `$q` | a digit that no block around has, for the names of counters |
//! | `$$` | `$` |

use std::collections::BTreeMap;
use std::sync::OnceLock;

use arbitrary::Unstructured;

/// Names that every program has from the start on, and what they're bound to.
pub(crate) const PRELUDE: &str = include_str!("prelude.py");

/// The last cell of every program: all that the others left.
pub(crate) const PROBE: &str = "print(i0, i1, i2, f0, f1, ascii([s0, s1, s2]), y0)\n\
    print(l0, l1, ascii(t0), ascii(t1))\nprint(d0, d1, sorted(z0), o0, o1, C0.made, C1.made, Base.made)\n\
    print(g0(5), g1(5), g2(5, 6))";

/// Before each statement and before all expressions of a type: what it is.
const HEAD: &str = "=== ";
/// Between expressions without holes for others and those with.
const DEEPER: &str = "---";
/// Kinds of statements that most likely raise: one in fifty is of them.
const FAILING: &[&str] = &["errors", "raise"];

const WORDS: &[&str] =
    &["'a'", "'b'", "'apple'", "'x y'", "'7'", "'é'", "'-1.5'", "'key'", "' pad '", "'Zz'"];
const FORMATS: &[&str] = &["d", "x", "05d", ",", "+d", "<8", ">8d", "#b", "^9", "_x", "e", "c"];
const EXCEPTIONS: &[&str] = &[
    "ValueError",
    "KeyError",
    "Exception",
    "IndexError",
    "TypeError",
    "ArithmeticError",
    "LookupError",
    "RuntimeError",
];
const NUMBERS: &[&str] = &["0", "1", "2", "3", "5", "8"];
/// Variables of each type, by the letter of their hole: `i0`, `i1`, ….
const VARIABLES: &[(char, char, u8)] = &[
    ('I', 'i', 3),
    ('F', 'f', 2),
    ('S', 's', 3),
    ('Y', 'y', 1),
    ('L', 'l', 2),
    ('T', 't', 2),
    ('D', 'd', 2),
    ('Z', 'z', 1),
    ('G', 'g', 3),
    ('O', 'o', 2),
    ('C', 'C', 2),
];

/// How deep expressions lie in expressions, and blocks in blocks.
const DEPTH: u32 = 3;
const BLOCKS: u32 = 2;

/// Expressions of one type.
#[derive(Default)]
struct Forms {
    /// Those without holes for other expressions, the simplest first.
    leaves: Vec<&'static str>,
    deeper: Vec<&'static str>,
}

type Statement = (&'static str, &'static str);

struct Grammar {
    /// By the letter of their hole.
    expressions: BTreeMap<char, Forms>,
    /// What each is of, and itself; the simplest first.
    statements: Vec<Statement>,
    failing: Vec<Statement>,
}

fn grammar() -> &'static Grammar {
    static GRAMMAR: OnceLock<Grammar> = OnceLock::new();
    GRAMMAR.get_or_init(|| {
        let mut expressions = BTreeMap::new();
        for (head, forms) in parts(include_str!("expressions.txt")) {
            let (leaves, deeper) = forms.split_once(DEEPER).expect("leaves come first");
            let lines = |text: &'static str| text.lines().filter(|line| !line.is_empty()).collect();
            let letter = head.chars().next().expect("a letter");
            expressions.insert(letter, Forms { leaves: lines(leaves), deeper: lines(deeper) });
        }
        let (failing, statements) =
            parts(include_str!("statements.txt")).partition(|(kind, _)| FAILING.contains(kind));
        Grammar { expressions, statements, failing }
    })
}

/// The parts of a file, each with what is in its head.
fn parts(text: &'static str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let mut rest = text.strip_prefix(HEAD).expect("a file begins with a head");
    std::iter::from_fn(move || {
        let (head, body) = rest.split_once('\n')?;
        let (body, next) = body.split_once(&format!("\n{HEAD}")).unwrap_or((body, ""));
        rest = next;
        Some((head, body.trim_end_matches('\n')))
    })
}

/// What the statements of a program were of.
pub(crate) type Kinds = Vec<&'static str>;

/// All kinds of statements.
pub(crate) fn kinds() -> impl Iterator<Item = &'static str> {
    let Grammar { statements, failing, .. } = grammar();
    statements.iter().chain(failing).map(|(kind, _)| *kind)
}

/// A statement; the choices decide what it is. Where they end, it's the simplest.
pub(crate) fn statement(choices: &[u8], kinds: &mut Kinds) -> String {
    let choices = Unstructured::new(choices);
    let mut writer = Writer { choices, text: String::new(), kinds };
    writer.statement(BLOCKS);
    writer.text
}

struct Writer<'choices, 'kinds> {
    choices: Unstructured<'choices>,
    text: String,
    kinds: &'kinds mut Kinds,
}

impl Writer<'_, '_> {
    /// A number up to `most`; 0 when there are no choices left.
    fn number(&mut self, most: usize) -> usize {
        self.choices.int_in_range(0..=most).unwrap_or(0)
    }

    fn choose<T: Copy>(&mut self, table: &[T]) -> T {
        table[self.number(table.len() - 1)]
    }

    fn statement(&mut self, blocks: u32) {
        let Grammar { statements, failing, .. } = grammar();
        let fails = self.number(49) == 49;
        let (mut kind, mut template) = self.choose(if fails { failing } else { statements });
        if template.contains("$B") && blocks == 0 {
            (kind, template) = statements[0];
        }
        self.kinds.push(kind);
        self.fill(template, DEPTH - (BLOCKS - blocks), blocks);
    }

    fn expression(&mut self, letter: char, depth: u32) {
        let forms = &grammar().expressions[&letter];
        let deeper = depth > 0 && self.number(9) > 3;
        let form = self.choose(if deeper { &forms.deeper } else { &forms.leaves });
        self.fill(form, depth.saturating_sub(1), 0);
    }

    fn block(&mut self, blocks: u32) {
        let line = self.text.rsplit('\n').next().unwrap_or_default();
        let indent = format!("\n{}", " ".repeat(line.len() - line.trim_start().len()));
        for number in 0..1 + self.number(2) / 2 {
            if number > 0 {
                self.text.push_str(&indent);
            }
            let before = self.text.len();
            self.statement(blocks);
            let inner = self.text.split_off(before).replace('\n', &indent);
            self.text.push_str(&inner);
        }
    }

    /// Writes a template with its holes filled.
    fn fill(&mut self, template: &str, depth: u32, blocks: u32) {
        let mut parts = template.split('$');
        self.text.push_str(parts.next().unwrap_or_default());
        while let Some(part) = parts.next() {
            let Some(hole) = part.chars().next() else {
                self.text.push('$');
                self.text.push_str(parts.next().unwrap_or_default());
                continue;
            };
            let rest = &part[1..];
            let sized = rest.strip_prefix("_sized").filter(|_| hole == 'h');
            self.fill_hole(if sized.is_some() { '#' } else { hole }, depth, blocks);
            self.text.push_str(sized.unwrap_or(rest));
        }
    }

    fn fill_hole(&mut self, hole: char, depth: u32, blocks: u32) {
        if let Some((_, letter, count)) = VARIABLES.iter().find(|(of, ..)| *of == hole) {
            let number = self.number(usize::from(*count) - 1);
            return self.text.push_str(&format!("{letter}{number}"));
        }
        let word = match hole {
            'n' => self.choose(NUMBERS),
            'w' => self.choose(WORDS),
            'k' => self.choose(FORMATS),
            'e' => self.choose(EXCEPTIONS),
            'q' => return self.text.push_str(&blocks.to_string()),
            'B' => return self.block(blocks - 1),
            '#' => {
                let letter = self.choose(&['l', 't', 'd']);
                return self.expression(letter, depth);
            }
            letter => return self.expression(letter, depth),
        };
        self.text.push_str(word);
    }
}
