//! Cells that are like others: lines come, go, and change their places.

/// Lines that make the host do something, and what cells are made of around them.
const LINES: &str = include_str!("cell_lines.txt");
const NUMBERS: &[&str] =
    &["0", "-1", "1", "255", "4096", "65536", "2**31", "2**32-1", "2**63", "1e308"];

/// Another cell like this one.
pub fn mutate_cell(cell: &mut Vec<u8>, seed: u32) {
    let mut state = u64::from(seed) | 1 << 40;
    let mut below = |end: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end.max(1)
    };
    let text = String::from_utf8_lossy(cell).into_owned();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let pool: Vec<&str> = LINES.lines().filter(|line| !line.is_empty()).collect();
    for _ in 0..=below(3) {
        let (at, from) = (below(lines.len() + 1), below(lines.len()));
        let indent = |line: &String| line.len() - line.trim_start().len();
        let depth = lines.get(at).or(lines.last()).map_or(0, indent);
        match below(8) {
            0 | 1 => lines.insert(at, " ".repeat(depth) + pool[below(pool.len())]),
            2 if !lines.is_empty() => drop(lines.remove(from)),
            3 if !lines.is_empty() => {
                let line = lines[from].clone();
                lines.insert(at, line);
            }
            4 if !lines.is_empty() => lines[from] = pool[below(pool.len())].to_owned(),
            5 if !lines.is_empty() => {
                let head = [
                    "if True:",
                    "while True:",
                    "for _ in range(100):",
                    "def f():",
                    "with open('/tmp/a', 'w') as f:",
                ];
                let inner = format!("{} {}", head[below(head.len())], lines[from].trim_start());
                lines[from] = inner;
            }
            6 if !lines.is_empty() => {
                let is_number = |c: char| c.is_ascii_digit();
                if let Some(start) = lines[from].find(is_number) {
                    let end = lines[from][start..].find(|c| !is_number(c));
                    let end = end.map_or(lines[from].len(), |end| start + end);
                    lines[from].replace_range(start..end, NUMBERS[below(NUMBERS.len())]);
                }
            }
            _ if !lines.is_empty() => {
                let to = below(lines.len());
                lines.swap(from, to);
            }
            _ => lines.push(pool[below(pool.len())].to_owned()),
        }
    }
    *cell = lines.join("\n").into_bytes();
}
