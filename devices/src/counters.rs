//! Sums of counters, which devices hand out as JSON objects.

use serde_json::{Map, Value};

/// Adds counters to those of the same names. Of `max_us` and `min_us` the larger and the smaller one stays; a minimum of
/// zero is none.
pub fn add_to_sum(sum: &mut Map<String, Value>, counters: &Value) {
    let Value::Object(counters) = counters else { return };
    for (key, value) in counters {
        let entry = sum.entry(key.clone());
        match value {
            Value::Object(_) => {
                if let Value::Object(inner) = entry.or_insert_with(|| Value::Object(Map::new())) {
                    add_to_sum(inner, value);
                }
            }
            _ => {
                let entry = entry.or_insert(Value::from(0u64));
                let (old, new) = (entry.as_u64().unwrap_or(0), value.as_u64().unwrap_or(0));
                *entry = Value::from(match key.as_str() {
                    "max_us" => old.max(new),
                    "min_us" if old != 0 && new != 0 => old.min(new),
                    _ => old.saturating_add(new),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sums_counters_and_keeps_the_extremes_of_durations() {
        let mut sum = Map::new();
        for counters in [
            json!({"a": 1, "agg": {"min_us": 4, "max_us": 9, "sum_us": 1}}),
            json!({"a": 2, "agg": {"min_us": 3, "max_us": 7, "sum_us": 1}}),
            json!({"a": 0, "agg": {"min_us": 0, "max_us": 0, "sum_us": 0}}),
        ] {
            add_to_sum(&mut sum, &counters);
        }
        assert_eq!(
            Value::Object(sum),
            json!({"a": 3, "agg": {"min_us": 3, "max_us": 9, "sum_us": 2}})
        );
    }
}
