//! Whether figures that were taken again and again are flat.
//!
//! Quiet moments after the warm-up, the first fifth of the time, are compared in two ways. *The ends*:
//! the median of the last third against the median of the first. *The slope*: the median of the slopes
//! between all pairs of moments (Theil and Sen's), times the time between the first and the last. A
//! figure has grown if both are beyond its slack: a leak shows in both, a single bad moment in neither.
//!
//! `KAA_ENDURANCE_LEAK` plants leaks, the smallest of a page for each scene of the mix: each of them has to
//! be found.

use crate::sample::{METRICS, Sample};

/// What a figure did, in words, if it's not flat.
pub(crate) fn growth(moments: &[(f64, Sample)]) -> Vec<String> {
    let mut grown = Vec::new();
    for (number, metric) in METRICS.iter().enumerate() {
        let points: Vec<(f64, f64)> =
            moments.iter().map(|(at, sample)| (*at, sample[number] as f64)).collect();
        // Of two moments a single bad one would decide.
        if points.len() < 3 {
            continue;
        }
        let (ends, slope) = (between_ends(&points), along_slope(&points));
        if ends.min(slope) > metric.slack as f64 {
            let unit = metric.unit as f64;
            grown.push(format!(
                "{}: {:.1} more at the end than after the warm-up, {:.1} by the slope; {:.1} are allowed",
                metric.name,
                ends / unit,
                slope / unit,
                metric.slack as f64 / unit
            ));
        }
    }
    grown
}

fn between_ends(points: &[(f64, f64)]) -> f64 {
    let third = points.len().div_ceil(3);
    let values = |points: &[(f64, f64)]| points.iter().map(|(_, value)| *value).collect();
    median(values(&points[points.len() - third..])) - median(values(&points[..third]))
}

fn along_slope(points: &[(f64, f64)]) -> f64 {
    let mut slopes = Vec::new();
    for (number, (from, before)) in points.iter().enumerate() {
        let later = points[number + 1..].iter();
        slopes.extend(later.map(|(to, after)| (after - before) / (to - from)));
    }
    let (Some((first, _)), Some((last, _))) = (points.first(), points.last()) else { return 0.0 };
    if slopes.is_empty() { 0.0 } else { median(slopes) * (last - first) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Made-up figures: those that grow are found, those that only move are not.
pub(crate) fn tells_leaks_from_noise() {
    // Something that looks like chance, and is the same each time.
    let noise = |moment: u64, most: u64| moment.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & most;
    let series = |number: usize, value: &dyn Fn(u64) -> u64| -> Vec<(f64, Sample)> {
        let at = |moment: u64| {
            let mut sample = [1000; METRICS.len()];
            sample[number] = value(moment);
            (moment as f64 * 3.0, sample)
        };
        (0..32).map(at).collect()
    };
    for (number, metric) in METRICS.iter().enumerate() {
        let slack = metric.slack + 1;
        let flat = series(number, &|moment| slack * 5 + noise(moment, slack));
        assert_eq!(growth(&flat), [""; 0], "{}", metric.name);
        let one_bad_moment = series(number, &|moment| slack * (1 + u64::from(moment == 30) * 50));
        assert_eq!(growth(&one_bad_moment), [""; 0], "{}", metric.name);
        let falling = series(number, &|moment| slack * (40 - moment));
        assert_eq!(growth(&falling), [""; 0], "{}", metric.name);
        let leak = series(number, &|moment| slack * (5 + moment / 8) + noise(moment, slack / 2));
        let found = growth(&leak);
        assert_eq!(found.len(), 1, "{}", metric.name);
        assert!(found[0].starts_with(metric.name), "{found:?}");
    }
}
