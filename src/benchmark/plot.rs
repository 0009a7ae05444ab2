//! Reports as a picture: a row per workload, a dot per subject, on scales of powers of ten.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figure::{Figure, digits, geometric_mean, show};
use super::report::{Report, Role};
use super::workload::{Unit, Workload};
use crate::error::{Error, Result};

const WIDTH: i32 = 1_280;
/// Where the dots' part begins and ends.
const LEFT: i32 = 330;
const RIGHT: i32 = WIDTH - 60;
const HEAD: i32 = 128;
const ROW: i32 = 46;
/// What a panel needs beside its rows: its scale, and air.
const SCALE: i32 = 52;
const FOOT: i32 = 30;
const DOT: i32 = 7;
/// Height of values, in pixels.
const VALUE: i32 = 13;
/// Where the largest value is less often the smallest, powers of ten are too few marks.
const FINE_BELOW: f64 = 30.0;
/// Of a character, in parts of its height: on average, in a face without serifs.
const CHARACTER_WIDTH: f64 = 0.58;

const INK: RGBColor = RGBColor(33, 37, 41);
const PALE: RGBColor = RGBColor(108, 117, 125);
const GRID: RGBColor = RGBColor(222, 226, 230);
const BAND: RGBColor = RGBColor(248, 249, 250);
/// Told apart also by those who don't see all colours; after Okabe and Ito, with grey for the floor.
const COLOURS: [RGBColor; 7] = [
    RGBColor(120, 120, 120),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(0, 158, 115),
    RGBColor(86, 180, 233),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Rows that have a scale in common.
struct Panel {
    title: &'static str,
    rows: Vec<Row>,
    quantity: Quantity,
}

struct Row {
    label: String,
    /// By subject.
    dots: Vec<Option<Dot>>,
}

#[derive(Clone, Copy)]
struct Dot {
    value: f64,
    low: f64,
    high: f64,
}

#[derive(Clone, Copy)]
enum Quantity {
    Measured(Unit),
    /// To the first subject.
    Ratio,
}

/// A logarithmic scale, from mark to mark.
struct Scale {
    marks: Vec<f64>,
}

impl From<Figure> for Dot {
    fn from(figure: Figure) -> Self {
        let (low, high) = figure.range();
        Self { value: figure.median, low, high }
    }
}

impl Quantity {
    fn show(self, value: f64) -> String {
        match self {
            Self::Measured(unit) => show(value, unit),
            Self::Ratio => digits(value) + " ×",
        }
    }

    /// What a mark of the scale says: a power of ten.
    fn mark(self, value: f64) -> String {
        let text = self.show(value);
        let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
        let number = match number.contains('.') {
            true => number.trim_end_matches('0').trim_end_matches('.'),
            false => number,
        };
        format!("{number} {unit}").trim_end().to_owned()
    }
}

impl Scale {
    /// From the mark below all dots to the one above. Marks are powers of ten, and where those are few also
    /// what is between them.
    fn of(rows: &[Row]) -> Option<Self> {
        let all = || rows.iter().flat_map(|row| row.dots.iter().flatten());
        let least = all().map(|dot| dot.low).filter(|low| *low > 0.0).min_by(f64::total_cmp)?;
        let most = all().map(|dot| dot.high).max_by(f64::total_cmp)?.max(least);
        let steps: &[f64] = if most / least < FINE_BELOW { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = least.log10().floor() as i32 - 1..=most.log10().ceil() as i32 + 1;
        let marks =
            powers.flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
        let mut marks: Vec<f64> = marks.collect();
        let first = marks.iter().rposition(|mark| *mark <= least)?;
        let last = marks.iter().position(|mark| *mark >= most)?.max(first + 1);
        marks.truncate(last + 1);
        Some(Self { marks: marks.split_off(first) })
    }

    fn place(&self, value: f64) -> i32 {
        let (low, high) = (self.marks[0].log10(), self.marks[self.marks.len() - 1].log10());
        let part = (value.max(f64::MIN_POSITIVE).log10() - low) / (high - low);
        LEFT + (part.clamp(0.0, 1.0) * f64::from(RIGHT - LEFT)).round() as i32
    }
}

impl Report {
    /// The report as an SVG of 1280 pixels in width: medians as dots, on logarithmic scales, with a line
    /// from the tenth to the ninetieth percentile.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when there is nothing to be seen.
    pub fn plot(&self) -> Result<String> {
        let panels = self.panels();
        if panels.is_empty() {
            return Err(Error::invalid("plot", "there is no figure that could be drawn"));
        }
        let rows: usize = panels.iter().map(|panel| panel.rows.len()).sum();
        let height = HEAD + rows as i32 * ROW + panels.len() as i32 * SCALE + FOOT;
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32));
            let area = area.into_drawing_area();
            self.draw(&area, &panels, height)
                .map_err(|error| Error::Internal(format!("drawing the plot: {error}")))?;
        }
        Ok(svg)
    }

    fn panels(&self) -> Vec<Panel> {
        let measured = |title, unit, wanted: &dyn Fn(&Workload) -> bool| {
            let workloads = self.workloads.iter().filter(|w| w.unit() == unit && wanted(w));
            let rows = workloads.map(|workload| self.row(*workload)).collect();
            Panel { title, rows, quantity: Quantity::Measured(unit) }
        };
        let is_cpu = |workload: &Workload| matches!(workload, Workload::Cpu(_));
        let panels = [
            measured("Time: less is better", Unit::Seconds, &|workload| !is_cpu(workload)),
            self.cpu_panel(),
            measured("Memory: less is better", Unit::Bytes, &|_| true),
            measured("Throughput: more is better", Unit::PerSecond, &|_| true),
        ];
        let has_dots =
            |panel: &Panel| panel.rows.iter().any(|row| row.dots.iter().any(Option::is_some));
        panels.into_iter().filter(has_dots).collect()
    }

    fn row(&self, workload: Workload) -> Row {
        let subjects = self.present(Role::Isolation);
        // Nothing has no place on a scale of powers.
        let figure = |name: &str| self.figure(name, workload).filter(|figure| figure.median > 0.0);
        let dots = subjects.iter().map(|s| figure(&s.name).map(Dot::from)).collect();
        Row { label: workload.title(), dots }
    }

    /// The mean of the set, and the parts that are nearest to the ends.
    fn cpu_panel(&self) -> Panel {
        let subjects = self.present(Role::Isolation);
        let (_, ratios) = self.cpu_ratios(&subjects);
        let dot = |ratios: &Vec<f64>| {
            let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            let high = ratios.iter().copied().fold(0.0, f64::max);
            geometric_mean(ratios).map(|value| Dot { value, low, high })
        };
        let dots = ratios.iter().map(dot).collect();
        let label = "CPU set, geometric mean".to_owned();
        Panel {
            title: "Computing, to the first: less is better; the line goes over the parts of the set",
            rows: vec![Row { label, dots }],
            quantity: Quantity::Ratio,
        }
    }

    fn draw(&self, area: &Area<'_>, panels: &[Panel], height: i32) -> Drawn {
        area.fill(&WHITE).map_err(owned)?;
        text(area, "What isolation costs", (40, 30), 30, INK, (HPos::Left, VPos::Center))?;
        let version = format!("Kaa {}; {}", self.kaa, self.machine.show());
        text(area, &version, (40, 62), 15, PALE, (HPos::Left, VPos::Center))?;
        self.draw_legend(area)?;
        let mut top = HEAD;
        for panel in panels {
            draw_panel(area, panel, top)?;
            top += panel.rows.len() as i32 * ROW + SCALE;
        }
        let foot = "Medians of blocks taken in turns; lines from the 10th to the 90th percentile, of few \
                    samples over all. Logarithmic scales. Made by `kaa bench isolation --plot`.";
        text(area, foot, (40, height - 16), 13, PALE, (HPos::Left, VPos::Center))?;
        area.present().map_err(owned)
    }

    fn draw_legend(&self, area: &Area<'_>) -> Drawn {
        let mut left = 46;
        for (subject, colour) in self.present(Role::Isolation).iter().zip(COLOURS.iter().cycle()) {
            area.draw(&Circle::new((left, 94), DOT, colour.filled())).map_err(owned)?;
            text(area, &subject.name, (left + 13, 94), 17, INK, (HPos::Left, VPos::Center))?;
            left += 46 + width(&subject.name, 17);
        }
        Ok(())
    }
}

fn draw_panel(area: &Area<'_>, panel: &Panel, top: i32) -> Drawn {
    let Some(scale) = Scale::of(&panel.rows) else { return Ok(()) };
    text(area, panel.title, (40, top + 8), 14, PALE, (HPos::Left, VPos::Center))?;
    let top = top + 20;
    let bottom = top + panel.rows.len() as i32 * ROW;
    for number in (0..panel.rows.len() as i32).step_by(2) {
        let corners = [(30, top + number * ROW), (RIGHT + 30, top + (number + 1) * ROW)];
        area.draw(&Rectangle::new(corners, BAND.filled())).map_err(owned)?;
    }
    for mark in &scale.marks {
        let x = scale.place(*mark);
        area.draw(&PathElement::new([(x, top), (x, bottom)], GRID)).map_err(owned)?;
        let words = panel.quantity.mark(*mark);
        text(area, &words, (x, bottom + 10), 13, PALE, (HPos::Center, VPos::Center))?;
    }
    for (number, row) in panel.rows.iter().enumerate() {
        let middle = top + number as i32 * ROW + ROW / 2;
        text(area, &row.label, (LEFT - 24, middle), 16, INK, (HPos::Right, VPos::Center))?;
        draw_row(area, row, middle, &scale, panel.quantity)?;
    }
    Ok(())
}

/// The dots of a row, and their values where there is room for them.
fn draw_row(area: &Area<'_>, row: &Row, middle: i32, scale: &Scale, quantity: Quantity) -> Drawn {
    let dots = || row.dots.iter().zip(COLOURS.iter().cycle());
    for (dot, colour) in dots().filter_map(|(dot, colour)| Some(((*dot)?, colour))) {
        let ends = [(scale.place(dot.low), middle), (scale.place(dot.high), middle)];
        area.draw(&PathElement::new(ends, colour.stroke_width(3))).map_err(owned)?;
        let centre = (scale.place(dot.value), middle);
        area.draw(&Circle::new(centre, DOT + 1, WHITE.filled())).map_err(owned)?;
        area.draw(&Circle::new(centre, DOT, colour.filled())).map_err(owned)?;
    }
    // Above and below the dots, from left to right: whatever would touch its neighbour is left out.
    let mut values: Vec<(Dot, RGBColor)> =
        dots().filter_map(|(dot, colour)| Some(((*dot)?, *colour))).collect();
    values.sort_by(|(a, _), (b, _)| a.value.total_cmp(&b.value));
    let mut ends = [i32::MIN; 2];
    for (dot, colour) in values {
        let value = quantity.show(dot.value);
        let (x, half) = (scale.place(dot.value), width(&value, VALUE) / 2);
        if let Some(line) = ends.iter().position(|end| *end < x - half) {
            let y = if line == 0 { middle - 15 } else { middle + 16 };
            text(area, &value, (x, y), VALUE, colour, (HPos::Center, VPos::Center))?;
            ends[line] = x + half + 4;
        }
    }
    Ok(())
}

fn text(
    area: &Area<'_>,
    words: &str,
    at: (i32, i32),
    size: i32,
    colour: RGBColor,
    (across, down): (HPos, VPos),
) -> Drawn {
    // Not even written as numbers may these be in XML.
    let words: String = words.chars().filter(|c| !c.is_control()).collect();
    let style = TextStyle::from(("sans-serif", size)).color(&colour).pos(Pos::new(across, down));
    area.draw(&Text::new(words, at, style)).map_err(owned)
}

/// Pixels of a text, roughly.
fn width(words: &str, size: i32) -> i32 {
    (words.chars().count() as f64 * f64::from(size) * CHARACTER_WIDTH) as i32
}

fn owned<E: std::error::Error>(error: E) -> Box<dyn std::error::Error + Send + Sync> {
    error.to_string().into()
}
