use super::*;

const MIB: u64 = 1 << 20;
const WINDOW: Range<u64> = 100 * MIB..1000 * MIB;

#[test]
fn the_lowest_aligned_place_is_taken() {
    assert_eq!(first_fit(&WINDOW, &[], 2 * MIB, 128 * MIB), Ok(128 * MIB));
}

#[test]
fn a_gap_that_is_large_enough_is_filled() {
    let taken = [128 * MIB..130 * MIB, 384 * MIB..400 * MIB];
    assert_eq!(first_fit(&WINDOW, &taken, 128 * MIB, 128 * MIB), Ok(256 * MIB));
    assert_eq!(first_fit(&WINDOW, &taken, 130 * MIB, 128 * MIB), Ok(512 * MIB));
}

#[test]
fn the_place_may_end_where_the_window_ends() {
    assert_eq!(first_fit(&WINDOW, &[], 872 * MIB, 128 * MIB), Ok(128 * MIB));
}

#[test]
fn what_does_not_fit_is_told_the_largest_gap() {
    assert_eq!(first_fit(&WINDOW, &[], 873 * MIB, 128 * MIB), Err(872 * MIB));
    let taken = std::slice::from_ref(&WINDOW);
    assert_eq!(first_fit(&WINDOW, taken, MIB, MIB), Err(0));
    assert_eq!(first_fit(&(5..5), &[], u64::MAX, 1), Err(0));
}
