//! What samples amount to.

use serde::{Deserialize, Serialize};

use super::workload::Unit;

/// Of fewer samples there are no tenths.
const SAMPLES_MIN: usize = 10;

/// The distribution of some samples.
///
/// ```
/// use kaa::benchmark::Figure;
///
/// let figure = Figure::of(&[3.0, 1.0, 2.0]).expect("there are samples");
/// assert_eq!((figure.samples, figure.median, figure.least), (3, 2.0, 1.0));
/// assert!(Figure::of(&[]).is_none());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// How many there are.
    pub samples: usize,
    /// The smallest one.
    pub least: f64,
    /// A tenth of them is at most this.
    pub p10: f64,
    /// Half of them is at most this.
    pub median: f64,
    /// Nine tenths of them are at most this.
    pub p90: f64,
    /// The largest one.
    pub most: f64,
}

impl Figure {
    /// The distribution; none of nothing, and of what isn't a number.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        if samples.is_empty() || samples.iter().any(|sample| !sample.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        // Between the two samples that are nearest, as numpy's `quantile` does by default.
        let at = |part: f64| {
            let place = (sorted.len() - 1) as f64 * part;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            rounded(below + (above - below) * place.fract())
        };
        Some(Self {
            samples: sorted.len(),
            least: at(0.0),
            p10: at(0.1),
            median: at(0.5),
            p90: at(0.9),
            most: at(1.0),
        })
    }

    /// As people read it: `131 µs (125–160)`. Of few samples the range is that of all, and says of how
    /// many: `14.0 MB (13.9–14.2, of 3)`.
    pub(super) fn show(&self, unit: Unit) -> String {
        let (factor, name) = scale(self.median, unit);
        let number = |value: f64| digits(value * factor);
        let median = with_unit(number(self.median), name);
        let (low, high) = self.range();
        let (low, high) = (number(low), number(high));
        let of = if self.has_tenths() { String::new() } else { format!(", of {}", self.samples) };
        format!("{median} ({low}–{high}{of})")
    }

    fn has_tenths(&self) -> bool {
        self.samples >= SAMPLES_MIN
    }

    /// Within what most samples are; few samples are all within it.
    pub(super) fn range(&self) -> (f64, f64) {
        if self.has_tenths() { (self.p10, self.p90) } else { (self.least, self.most) }
    }
}

/// To six digits: no sample is worth more, and JSON gives back exactly what it was given.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// A value with its unit: `131 µs`.
pub(super) fn show(value: f64, unit: Unit) -> String {
    let (factor, name) = scale(value, unit);
    with_unit(digits(value * factor), name)
}

fn with_unit(number: String, unit: &str) -> String {
    if unit.is_empty() { number } else { format!("{number} {unit}") }
}

/// What a value is multiplied with to be read in this unit.
fn scale(value: f64, unit: Unit) -> (f64, &'static str) {
    match unit {
        Unit::Seconds => match value {
            ..1e-6 => (1e9, "ns"),
            ..1e-3 => (1e6, "µs"),
            ..1.0 => (1e3, "ms"),
            _ => (1.0, "s"),
        },
        Unit::Bytes => match value {
            ..1e3 => (1.0, "B"),
            ..1e6 => (1e-3, "kB"),
            _ => (1e-6, "MB"),
        },
        Unit::PerSecond => (1.0, ""),
    }
}

/// Three digits that count; whole numbers in full, with marks between thousands.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        ..1_000.0 => format!("{value:.0}"),
        _ => {
            let text = format!("{value:.0}");
            let (head, tail) = text.split_at(text.len() - 3);
            format!("{},{tail}", if head.len() > 3 { thousands(head) } else { head.to_owned() })
        }
    }
}

fn thousands(digits: &str) -> String {
    let (head, tail) = digits.split_at(digits.len() - 3);
    if head.is_empty() { tail.to_owned() } else { format!("{head},{tail}") }
}

/// The mean of ratios: the one that doesn't depend on which side is the base.
pub(super) fn geometric_mean(ratios: &[f64]) -> Option<f64> {
    if ratios.is_empty() {
        return None;
    }
    let sum: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    Some((sum / ratios.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        for (value, unit, text) in [
            (1.234e-7, Unit::Seconds, "123 ns"),
            (1.31e-4, Unit::Seconds, "131 µs"),
            (0.0051, Unit::Seconds, "5.10 ms"),
            (2.5, Unit::Seconds, "2.50 s"),
            (200.0, Unit::Bytes, "200 B"),
            (540_000.0, Unit::Bytes, "540 kB"),
            (12_582_912.0, Unit::Bytes, "12.6 MB"),
            (9_812.4, Unit::PerSecond, "9,812"),
            (1_234_567.0, Unit::PerSecond, "1,234,567"),
            (3.456, Unit::PerSecond, "3.46"),
        ] {
            assert_eq!(show(value, unit), text);
        }
        let figure = Figure::of(&[1e-3, 2e-3, 3e-3]).unwrap();
        assert_eq!(figure.show(Unit::Seconds), "2.00 ms (1.00–3.00, of 3)");
        let figure = Figure::of(&[1e-3, 2e-3, 3e-3].repeat(4)).unwrap();
        assert_eq!(figure.show(Unit::Seconds), "2.00 ms (1.00–3.00)");
    }

    #[test]
    fn nothing_and_no_numbers_make_no_figure() {
        assert_eq!(Figure::of(&[]), None);
        assert_eq!(Figure::of(&[1.0, f64::NAN]), None);
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[2.0, 0.5]), Some(1.0));
    }
}
