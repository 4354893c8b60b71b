//! Numbers as people read them: bytes, rates, times, counts.

use std::time::Duration;

/// `812 B`, `1.5 KiB`, `1.0 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// Bytes a second.
pub(crate) fn rate(per_second: f64) -> String {
    format!("{}/s", bytes(per_second.max(0.0) as u64))
}

/// `0.31 ms`, `12.4 ms`, `840 ms`, `1.42 s`, `2 m 05 s`.
pub(crate) fn milliseconds(ms: f64) -> String {
    if ms < 0.995 {
        format!("{ms:.2} ms")
    } else if ms < 99.95 {
        format!("{ms:.1} ms")
    } else if ms < 999.5 {
        format!("{ms:.0} ms")
    } else if ms < 59_995.0 {
        format!("{:.2} s", ms / 1000.0)
    } else {
        let seconds = (ms / 1000.0).round() as u64;
        format!("{} m {:02} s", seconds / 60, seconds % 60)
    }
}

/// A duration in the words of [`milliseconds`].
pub(crate) fn duration(time: Duration) -> String {
    milliseconds(time.as_secs_f64() * 1000.0)
}

/// `262,144`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How long ago a moment (milliseconds since 1970) is: `12 s`, `3 min`, `5 h`, `2 days`.
pub(crate) fn age(then_ms: u64, now_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_one_decimal() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(rate(1.5 * 1024.0 * 1024.0), "1.5 MiB/s");
    }

    #[test]
    fn times_choose_their_unit() {
        for (ms, text) in [
            (0.0, "0.00 ms"),
            (0.31, "0.31 ms"),
            (0.996, "1.0 ms"),
            (12.44, "12.4 ms"),
            (840.2, "840 ms"),
            (999.7, "1.00 s"),
            (1420.0, "1.42 s"),
            (59_996.0, "1 m 00 s"),
            (125_000.0, "2 m 05 s"),
        ] {
            assert_eq!(milliseconds(ms), text, "{ms}");
        }
    }

    #[test]
    fn counts_are_grouped() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(262_144), "262,144");
        assert_eq!(count(1_000_000), "1,000,000");
    }

    #[test]
    fn ages_are_rough() {
        assert_eq!(age(0, 59_999), "59 s");
        assert_eq!(age(0, 60_000), "1 min");
        assert_eq!(age(0, 7_200_000), "2 h");
        assert_eq!(age(0, 3 * 86_400_000), "3 days");
        assert_eq!(age(10, 0), "0 s");
    }
}
