use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{RateLimiter, RateLimiterConfig, SharedLimiter, TokenBucket, TokenBucketConfig};

fn config(size: u64, burst: u64, refill_time: u64) -> TokenBucketConfig {
    TokenBucketConfig {
        size,
        one_time_burst: Some(burst),
        refill_time,
    }
}

fn bucket(size: u64, burst: u64, refill_time: u64) -> TokenBucket {
    TokenBucket::new(&config(size, burst, refill_time)).unwrap()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// A bucket with the moment it is at.
struct Running {
    bucket: TokenBucket,
    now: Instant,
}

impl Running {
    fn new(bucket: TokenBucket) -> Self {
        let mut running = Self {
            bucket,
            now: Instant::now(),
        };
        running.pass(Duration::ZERO);
        running
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.bucket.refill(self.now);
    }

    fn take(&mut self, tokens: u64) -> Result<(), Duration> {
        self.bucket.take(tokens)
    }

    /// Takes as soon as possible.
    fn wait_and_take(&mut self, tokens: u64) -> Duration {
        let Err(wait) = self.take(tokens) else {
            return Duration::ZERO;
        };
        self.pass(wait);
        assert_eq!(self.take(tokens), Ok(()));
        wait
    }
}

#[test]
fn spends_the_burst_then_the_bucket_and_then_waits() {
    let mut bucket = Running::new(bucket(100, 50, 1000));
    assert_eq!(bucket.take(150), Ok(()));
    assert_eq!(bucket.take(1), Err(millis(10)));
    bucket.pass(millis(10));
    assert_eq!(bucket.take(1), Ok(()));
    bucket.pass(millis(500));
    assert_eq!(bucket.take(51), Err(millis(10)));
    assert_eq!(bucket.take(50), Ok(()));
}

#[test]
fn holds_no_more_than_its_size_and_the_burst_never_comes_back() {
    let mut bucket = Running::new(bucket(100, 50, 1000));
    bucket.take(150).unwrap();
    bucket.pass(Duration::from_secs(1 << 40));
    assert_eq!(bucket.take(100), Ok(()));
    assert_eq!(bucket.take(1), Err(millis(10)));
}

#[test]
fn a_request_above_the_size_takes_a_full_bucket_and_is_waited_for() {
    let mut bucket = Running::new(bucket(100, 0, 1000));
    bucket.take(1).unwrap();
    assert_eq!(bucket.take(250), Err(millis(10)));
    bucket.pass(millis(10));
    assert_eq!(bucket.take(250), Ok(()));
    assert_eq!(bucket.take(1), Err(millis(1510)));
    assert_eq!(bucket.take(250), Err(millis(2500)));
    bucket.pass(millis(1509));
    assert_eq!(bucket.take(1), Err(millis(1)));
}

#[test]
fn nothing_costs_nothing_even_from_an_overdrawn_bucket() {
    let mut bucket = Running::new(bucket(10, 0, 1000));
    bucket.take(25).unwrap();
    assert_eq!(bucket.take(0), Ok(()));
}

#[test]
fn parts_of_a_token_are_not_lost_however_often_it_is_asked() {
    // 3 tokens in 1 s: one each 333,333,333.3 ns.
    let mut bucket = Running::new(bucket(3, 0, 1000));
    bucket.take(3).unwrap();
    for _ in 0..999 {
        bucket.pass(millis(1));
    }
    assert_eq!(bucket.take(3), Err(millis(1)));
    bucket.pass(millis(1));
    assert_eq!(bucket.take(3), Ok(()));
    assert_eq!(bucket.take(1), Err(Duration::from_nanos(333_333_334)));
}

#[test]
fn a_clock_that_goes_back_gives_nothing_twice() {
    let mut bucket = bucket(10, 0, 1000);
    let start = Instant::now() + Duration::from_secs(10);
    bucket.refill(start);
    bucket.take(10).unwrap();
    bucket.refill(start - Duration::from_secs(5));
    bucket.refill(start + millis(100));
    assert_eq!(bucket.take(2), Err(millis(100)));
    assert_eq!(bucket.take(1), Ok(()));
}

#[test]
fn the_largest_numbers_work() {
    let mut slow = Running::new(bucket(1, 0, u64::MAX));
    slow.take(u64::MAX).unwrap();
    assert_eq!(slow.take(1), Err(Duration::from_nanos(u64::MAX)));
    slow.pass(Duration::from_secs(1 << 40));
    let mut large = Running::new(bucket(u64::MAX, u64::MAX, 1));
    large.take(u64::MAX).unwrap();
    large.take(u64::MAX).unwrap();
    assert_eq!(large.take(1), Err(Duration::from_nanos(1)));
    large.pass(Duration::from_secs(1 << 40));
    assert_eq!(large.take(u64::MAX), Ok(()));
}

#[test]
fn a_disabled_bucket_is_none() {
    assert_eq!(TokenBucket::new(&config(0, 9, 9)), None);
    assert_eq!(TokenBucket::new(&config(9, 9, 0)), None);
}

#[test]
fn what_is_left_survives_a_snapshot_without_a_new_burst() {
    let mut before = Running::new(bucket(100, 50, 1000));
    before.take(130).unwrap();
    let saved = before.bucket.save(before.now + millis(100));

    let mut after = bucket(100, 50, 1000);
    after.load(saved).unwrap();
    let mut after = Running::new(after);
    assert_eq!(after.take(31), Err(millis(10)));
    assert_eq!(after.take(30), Ok(()));
}

fn limits(bandwidth: Option<TokenBucketConfig>, ops: Option<TokenBucketConfig>) -> RateLimiterConfig {
    RateLimiterConfig { bandwidth, ops }
}

#[test]
fn a_limiter_takes_from_both_buckets_or_none() {
    let both = limits(Some(config(100, 0, 1000)), Some(config(2, 0, 1000)));
    let mut limiter = RateLimiter::new(&both);
    let start = Instant::now();
    limiter.refill(start);
    assert_eq!(limiter.take(60), Ok(()));
    assert_eq!(limiter.take(60), Err(millis(200)));
    assert_eq!(limiter.take(0), Ok(()));
    assert_eq!(limiter.take(60), Err(millis(500)));
    limiter.refill(start + millis(500));
    assert_eq!(limiter.take(60), Ok(()));
}

#[test]
fn a_limiter_without_buckets_limits_nothing() {
    let mut limiter = RateLimiter::new(&limits(Some(config(0, 0, 1)), None));
    assert!(!limiter.limits_something());
    assert_eq!(limiter.take(u64::MAX), Ok(()));
    assert_eq!(limiter, RateLimiter::default());
}

#[test]
fn a_patch_fills_the_buckets_it_names_and_leaves_the_others() {
    let mut limiter = RateLimiter::new(&limits(Some(config(100, 0, 1000)), Some(config(1, 0, 1000))));
    limiter.take(100).unwrap();
    limiter.patch(&limits(None, Some(config(5, 0, 1000))));
    assert_eq!(limiter.take(1), Err(millis(10)));
    limiter.patch(&limits(Some(config(0, 0, 0)), None));
    (0..5).for_each(|_| limiter.take(1000).unwrap());
    assert_eq!(limiter.take(1), Err(millis(200)));
}

#[test]
fn a_state_of_other_limits_is_refused_and_changes_nothing() {
    let now = Instant::now();
    let with_burst = |burst| RateLimiter::new(&limits(Some(config(9, burst, 9)), Some(config(9, burst, 9))));
    let only_ops = RateLimiter::new(&limits(None, Some(config(9, 0, 9))));
    let mut limiter = with_burst(1);
    assert!(limiter.load(only_ops.save(now)).is_err());
    assert!(limiter.load(with_burst(2).save(now)).is_err());
    assert_eq!(limiter, with_burst(1));
    assert_eq!(limiter.load(with_burst(0).save(now)), Ok(()));
    assert_eq!(limiter, with_burst(0));
}

/// A bucket's config: small and large, fast and slow.
fn any_config() -> impl Strategy<Value = TokenBucketConfig> {
    let size = prop_oneof![
        1..=10u64,
        1..=1u64 << 30,
        any::<u64>().prop_map(|size| size.max(1))
    ];
    let refill_time = prop_oneof![1..=10u64, 1..=100_000u64];
    (size, 0..=1000u64, refill_time).prop_map(|(size, burst, refill_time)| config(size, burst, refill_time))
}

/// Steps of a consumer: how long it rests, and what it then asks for, as a share of the size in thousandths.
fn any_steps() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let rest = prop_oneof![Just(0), 1..=1000u64, 1..=100_000_000u64];
    proptest::collection::vec((rest, 1..=2500u64), 1..60)
}

fn share(size: u64, thousandths: u64) -> u64 {
    let tokens = u128::from(size) * u128::from(thousandths) / 1000;
    u64::try_from(tokens).unwrap_or(u64::MAX).max(1)
}

/// Tokens that come in `nanos`, rounded down.
fn refill(config: &TokenBucketConfig, nanos: u128) -> u128 {
    nanos * u128::from(config.size) / (u128::from(config.refill_time) * 1_000_000)
}

proptest! {
    /// In no span of time does more go than burst, size and refill allow; the last request counts as a full bucket
    /// when it is larger than that.
    #[test]
    fn never_more_than_burst_and_size_and_rate(config in any_config(), steps in any_steps()) {
        let mut running = Running::new(TokenBucket::new(&config).unwrap());
        let mut gone: Vec<(Instant, u64)> = Vec::new();
        for (rest, thousandths) in steps {
            running.pass(Duration::from_nanos(rest));
            let tokens = share(config.size, thousandths);
            if running.take(tokens).is_err() {
                continue;
            }
            let mut sum = u128::from(tokens.min(config.size));
            let burst = u128::from(config.one_time_burst.unwrap());
            for &(moment, tokens) in gone.iter().rev() {
                sum += u128::from(tokens);
                let span = running.now.duration_since(moment).as_nanos();
                prop_assert!(sum <= burst + u128::from(config.size) + refill(&config, span));
            }
            gone.push((running.now, tokens));
        }
    }

    /// Who always takes as soon as it can gets all that comes until its last request, which has taken the rest. Less
    /// than a nanosecond is lost in each wait, as moments are whole ones.
    #[test]
    fn a_greedy_consumer_reaches_the_rate(
        config in any_config(),
        requests in proptest::collection::vec(1..=2500u64, 1..60),
    ) {
        let mut running = Running::new(TokenBucket::new(&config).unwrap());
        let (start, mut sum, mut waits) = (running.now, 0, 0);
        for thousandths in requests {
            let tokens = share(config.size, thousandths);
            let waited = !running.wait_and_take(tokens).is_zero();
            sum += u128::from(tokens);
            waits += u128::from(waited);
            let span = running.now.duration_since(start).as_nanos();
            let came = u128::from(config.one_time_burst.unwrap())
                + u128::from(config.size)
                + refill(&config, span.saturating_sub(waits));
            prop_assert!(sum >= came || !waited, "{sum} of {came}");
        }
    }

    /// Asking in between, in vain or for nothing, changes nothing.
    #[test]
    fn asking_often_gives_no_more_and_no_less(config in any_config(), steps in any_steps()) {
        let mut often = Running::new(TokenBucket::new(&config).unwrap());
        let mut seldom = Running { bucket: often.bucket, now: often.now };
        for (rest, thousandths) in steps {
            let tokens = share(config.size, thousandths);
            for _ in 0..rest.min(20) {
                often.pass(Duration::from_nanos(rest / rest.min(20)));
                let _ = often.take(0);
            }
            seldom.pass(often.now.duration_since(seldom.now));
            prop_assert_eq!(often.take(tokens), seldom.take(tokens));
        }
        prop_assert_eq!(often.bucket, seldom.bucket);
    }

    /// Each request of several users goes when it would if all were in one queue, whoever of them comes late to its turn or
    /// asks early.
    #[test]
    fn users_are_served_in_the_order_in_which_they_came(
        bandwidth in any_config(),
        ops in any_config(),
        steps in any_steps(),
        users in proptest::collection::vec(0..4usize, 60),
    ) {
        let limits = limits(Some(bandwidth), Some(ops));
        let (mut shared, mut alone) = (SharedLimiter::new(RateLimiter::new(&limits)), RateLimiter::new(&limits));
        (1..4).for_each(|user| assert_eq!(shared.join(), user));
        let mut now = Instant::now();
        let mut last = now;
        let mut waiting = [None; 4];
        for ((rest, thousandths), user) in steps.into_iter().zip(users) {
            now += Duration::from_nanos(rest);
            shared.refill(now);
            let id = u32::try_from(user).unwrap();
            if let Some((bytes, due)) = waiting[user] {
                let expected = if due <= now { Ok(()) } else { Err(due) };
                prop_assert_eq!(shared.take(id, bytes, now), expected);
                waiting[user] = waiting[user].filter(|_| due > now);
                continue;
            }
            let bytes = share(bandwidth.size, thousandths);
            last = last.max(now);
            alone.refill(last);
            if let Err(wait) = alone.take(bytes) {
                last += wait;
                alone.refill(last);
                prop_assert_eq!(alone.take(bytes), Ok(()));
            }
            let taken = shared.take(id, bytes, now);
            prop_assert_eq!(taken, if last == now { Ok(()) } else { Err(last) });
            waiting[user] = taken.err().map(|due| (bytes, due));
        }
    }
}
