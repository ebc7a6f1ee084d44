use std::sync::Mutex;
use std::thread;

use super::*;

const MASKED: u32 = 1;
const OPEN: u32 = 0;
const ON: u16 = control::ENABLE;

#[derive(Default)]
struct Router {
    routes: Mutex<Vec<(u16, MsiMessage)>>,
    broken: AtomicBool,
}

impl MsiRouter for Router {
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("no route"));
        }
        self.routes.lock().unwrap().push((vector, message));
        Ok(())
    }
}

impl Router {
    fn take(&self) -> Vec<(u16, MsiMessage)> {
        std::mem::take(&mut self.routes.lock().unwrap())
    }
}

fn msix(count: u16) -> (Arc<Router>, Arc<MsixVectors>, Msix) {
    let router = Arc::<Router>::default();
    let vectors = Arc::new(MsixVectors::new(count).unwrap());
    let msix = Msix::new(Arc::clone(&vectors), Arc::clone(&router) as Arc<dyn MsiRouter>);
    (router, vectors, msix)
}

fn write_entry(msix: &mut Msix, vector: u64, data: u32, entry_control: u32) {
    let at = vector * ENTRY_LEN;
    msix.write_table(at, &0xfee0_1000u32.to_le_bytes());
    msix.write_table(at + 4, &1u32.to_le_bytes());
    msix.write_table(at + 8, &data.to_le_bytes());
    msix.write_table(at + 12, &entry_control.to_le_bytes());
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0x1_fee0_1000,
        data,
    }
}

fn sent(vectors: &MsixVectors, vector: usize) -> u64 {
    vectors.irqfds().nth(vector).unwrap().read().unwrap_or(0)
}

fn pba(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pba(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn routes_and_sends_an_open_vector() {
    let (router, vectors, mut msix) = msix(3);
    msix.set_control(ON);
    write_entry(&mut msix, 1, 0x41, OPEN);
    assert!(vectors.raise(1));
    assert_eq!(router.take(), [(1, message(0x41))]);
    assert_eq!((sent(&vectors, 0), sent(&vectors, 1)), (0, 1));
}

#[test]
fn holds_a_masked_vector_pending_until_it_is_unmasked() {
    let (_, vectors, mut msix) = msix(2);
    msix.set_control(ON);
    write_entry(&mut msix, 1, 0x41, MASKED);
    assert!(!vectors.raise(1));
    assert_eq!((sent(&vectors, 1), pba(&msix)), (0, 0b10));
    msix.write_table(28, &OPEN.to_le_bytes());
    assert_eq!((sent(&vectors, 1), pba(&msix)), (1, 0));
}

#[test]
fn holds_all_vectors_back_under_the_function_mask() {
    let (router, vectors, mut msix) = msix(2);
    msix.set_control(ON | control::FUNCTION_MASK);
    write_entry(&mut msix, 0, 0x40, OPEN);
    assert!(!vectors.raise(0));
    assert_eq!(router.take(), []);
    msix.set_control(ON);
    assert_eq!((sent(&vectors, 0), router.take().len()), (1, 1));
}

#[test]
fn sends_nothing_while_turned_off() {
    let (router, vectors, mut msix) = msix(1);
    write_entry(&mut msix, 0, 0x40, OPEN);
    assert!(!vectors.raise(0));
    assert_eq!((sent(&vectors, 0), router.take().len()), (0, 0));
    assert!(vectors.take_pending());
    assert!(!vectors.take_pending());
}

#[test]
fn tells_the_router_only_what_is_new() {
    let (router, _, mut msix) = msix(1);
    msix.set_control(ON);
    write_entry(&mut msix, 0, 0x40, OPEN);
    write_entry(&mut msix, 0, 0x40, MASKED);
    write_entry(&mut msix, 0, 0x40, OPEN);
    msix.set_control(ON | control::FUNCTION_MASK);
    msix.set_control(ON);
    assert_eq!(router.take(), [(0, message(0x40))]);
    msix.write_table(8, &0x50u32.to_le_bytes());
    assert_eq!(router.take(), [(0, message(0x50))]);
}

#[test]
fn keeps_a_vector_without_a_route_masked() {
    let (router, vectors, mut msix) = msix(1);
    router.broken.store(true, Ordering::Relaxed);
    msix.set_control(ON);
    write_entry(&mut msix, 0, 0x40, OPEN);
    assert!(!vectors.raise(0));
    router.broken.store(false, Ordering::Relaxed);
    msix.write_table(12, &OPEN.to_le_bytes());
    assert_eq!(sent(&vectors, 0), 1);
}

#[test]
fn takes_whole_words_and_quadwords_and_reads_any_part() {
    let (_, _, mut msix) = msix(1);
    msix.write_table(0, &0x8877_6655_4433_2211u64.to_le_bytes());
    msix.write_table(8, &u64::MAX.to_le_bytes());
    msix.write_table(2, &[0; 4]);
    msix.write_table(4, &[0; 8]);
    msix.write_table(1, &[0]);
    let mut data = [0; 16];
    msix.read_table(0, &mut data);
    assert_eq!(data[..8], 0x8877_6655_4433_2211u64.to_le_bytes());
    assert_eq!(data[8..], [0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    let mut part = [0; 2];
    msix.read_table(3, &mut part);
    assert_eq!(part, [0x44, 0x55]);
}

#[test]
fn ignores_what_lies_behind_the_last_vector() {
    let (_, vectors, mut msix) = msix(1);
    msix.write_table(16, &[0; 4]);
    msix.write_table(u64::MAX - 7, &[0; 8]);
    let mut data = [0xaa; 4];
    msix.read_table(16, &mut data);
    msix.read_pba(8, &mut data);
    assert_eq!(data, [0xaa; 4]);
    assert!(vectors.raise(1));
}

#[test]
fn describes_itself_in_its_capability() {
    let (_, _, msix) = msix(3);
    let (body, writable) = msix.capability(0x4000, 0x6000);
    assert_eq!(body, [2, 0, 0, 0x40, 0, 0, 0, 0x60, 0, 0]);
    assert_eq!(writable, [0, 0xc0]);
}

#[test]
fn loses_no_interrupt_when_raising_races_with_masking() {
    let (_, vectors, mut msix) = msix(1);
    msix.set_control(ON);
    write_entry(&mut msix, 0, 0x40, OPEN);
    thread::scope(|scope| {
        let raiser = scope.spawn(|| {
            (0..2000).for_each(|_| {
                vectors.raise(0);
                // An interrupt that is neither sent nor pending now is lost: nobody would ever take it.
                while sent(&vectors, 0) == 0 {
                    thread::yield_now();
                }
            });
        });
        while !raiser.is_finished() {
            msix.write_table(12, &MASKED.to_le_bytes());
            thread::yield_now();
            msix.write_table(12, &OPEN.to_le_bytes());
            thread::yield_now();
        }
    });
    assert_eq!(pba(&msix), 0);
}

#[test]
fn loads_what_it_saved_and_delivers_what_was_pending() {
    let (_, vectors, mut old) = msix(2);
    old.set_control(ON | control::FUNCTION_MASK);
    write_entry(&mut old, 1, 0x41, OPEN);
    vectors.raise(1);
    let state = old.save();
    let (router, vectors, mut new) = msix(2);
    new.load(state.clone()).unwrap();
    assert_eq!(new.save(), state);
    new.set_control(ON);
    assert_eq!(router.take(), [(1, message(0x41))]);
    assert_eq!(sent(&vectors, 1), 1);
}

#[test]
fn refuses_the_state_of_another_table() {
    let (_, _, old) = msix(2);
    let (_, _, mut new) = msix(3);
    assert!(matches!(
        new.load(old.save()),
        Err(StateError::Inconsistent { .. })
    ));
}
