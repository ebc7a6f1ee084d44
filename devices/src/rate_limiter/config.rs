//! Rate limits as the user writes them.
//!
//! These are plain config types. Devices have them as a part of their own config, so the JSON shape is the same
//! everywhere.

use serde::{Deserialize, Serialize, Serializer};

/// Limits of one device or of one direction of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Limits bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Limits operations.
    pub ops: Option<TokenBucketConfig>,
}

/// A bucket of tokens that fills up at a steady rate. Unknown fields are accepted, as clients of Firecracker expect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Tokens that the bucket holds; zero disables the bucket.
    pub size: u64,
    /// Tokens that can be spent once, before the bucket is used. Zero is the same as none.
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills up; zero disables the bucket.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// True when the bucket limits anything.
    pub fn is_effective(&self) -> bool {
        self.size != 0 && self.refill_time != 0
    }

    /// The bucket as it takes effect: none when disabled, no burst of zero.
    fn effective(self) -> Option<Self> {
        self.is_effective().then(|| Self {
            one_time_burst: self.one_time_burst.filter(|&burst| burst != 0),
            ..self
        })
    }
}

impl RateLimiterConfig {
    /// True when a bucket limits anything.
    pub fn is_effective(&self) -> bool {
        self.effective().is_some()
    }

    /// The limits as they take effect: without disabled buckets, and none when nothing is limited.
    pub fn effective(&self) -> Option<Self> {
        let bucket = |bucket: Option<TokenBucketConfig>| bucket.and_then(TokenBucketConfig::effective);
        let limits = Self {
            bandwidth: bucket(self.bandwidth),
            ops: bucket(self.ops),
        };
        (limits != Self::default()).then_some(limits)
    }

    /// The limits after `patch`: a bucket that it leaves out stays, and one that is disabled is removed.
    pub fn patched(&self, patch: &Self) -> Self {
        let bucket = |old, new: Option<TokenBucketConfig>| new.map_or(old, TokenBucketConfig::effective);
        Self {
            bandwidth: bucket(self.bandwidth, patch.bandwidth),
            ops: bucket(self.ops, patch.ops),
        }
    }

    /// Takes the patch of a device's limits into the device's config; nothing changes without one.
    pub fn patch(limits: &mut Option<Self>, patch: Option<&Self>) {
        if let Some(patch) = patch {
            *limits = limits.unwrap_or_default().patched(patch).effective();
        }
    }
}

/// Prints the limits as they take effect, `null` when nothing is limited. For `#[serde(serialize_with)]` on a config's
/// field; a patch must not use it, as there a disabled bucket means removal.
pub fn serialize_effective<S: Serializer>(
    limits: &Option<RateLimiterConfig>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    limits.and_then(|limits| limits.effective()).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Echo(#[serde(serialize_with = "serialize_effective")] Option<RateLimiterConfig>);

    fn parse(json: &str) -> RateLimiterConfig {
        serde_json::from_str(json).unwrap()
    }

    fn echo(json: &str) -> String {
        serde_json::to_string(&Echo(Some(parse(json)))).unwrap()
    }

    #[test]
    fn is_effective_with_one_live_bucket() {
        assert!(parse(r#"{"ops":{"size":5,"refill_time":9}}"#).is_effective());
        assert!(
            !parse(r#"{"ops":{"size":0,"refill_time":9},"bandwidth":{"size":1,"refill_time":0}}"#)
                .is_effective()
        );
        assert!(!parse("{}").is_effective());
    }

    #[test]
    fn prints_only_what_takes_effect() {
        assert_eq!(
            echo(
                r#"{"ops":{"size":5,"one_time_burst":7,"refill_time":9},"bandwidth":{"size":0,"refill_time":1}}"#
            ),
            r#"{"bandwidth":null,"ops":{"size":5,"one_time_burst":7,"refill_time":9}}"#
        );
        assert_eq!(
            echo(r#"{"bandwidth":{"size":5,"one_time_burst":0,"refill_time":9}}"#),
            r#"{"bandwidth":{"size":5,"one_time_burst":null,"refill_time":9},"ops":null}"#
        );
        assert_eq!(echo(r#"{"ops":{"size":5,"refill_time":0}}"#), "null");
    }

    #[test]
    fn a_patch_replaces_keeps_and_removes_buckets() {
        let mut limits = Some(parse(
            r#"{"ops":{"size":5,"refill_time":9},"bandwidth":{"size":6,"refill_time":9}}"#,
        ));
        let mut patch = |json: &str| {
            RateLimiterConfig::patch(&mut limits, Some(&parse(json)));
            serde_json::to_string(&limits).unwrap()
        };
        assert_eq!(
            patch(r#"{"ops":{"size":7,"one_time_burst":0,"refill_time":8}}"#),
            r#"{"bandwidth":{"size":6,"one_time_burst":null,"refill_time":9},"ops":{"size":7,"one_time_burst":null,"refill_time":8}}"#
        );
        assert_eq!(
            patch(r#"{"bandwidth":{"size":0,"refill_time":8},"ops":null}"#),
            r#"{"bandwidth":null,"ops":{"size":7,"one_time_burst":null,"refill_time":8}}"#
        );
        assert_eq!(patch(r#"{"ops":{"size":7,"refill_time":0}}"#), "null");
        RateLimiterConfig::patch(&mut limits, None);
        assert_eq!(limits, None);
    }

    #[test]
    fn accepts_unknown_fields_in_a_bucket_only() {
        assert!(parse(r#"{"ops":{"size":5,"refill_time":9,"x":1}}"#).is_effective());
        assert!(serde_json::from_str::<RateLimiterConfig>(r#"{"x":1}"#).is_err());
    }
}
