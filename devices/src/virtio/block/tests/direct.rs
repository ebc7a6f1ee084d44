//! Drives that go past the page cache. What their requests find is what those of others do.

use super::super::{IoEngine, OpenError};
use super::*;

/// An image where O_DIRECT is possible: beside this program, as temporary folders may be in memory.
fn image_on_disk(len: usize) -> TempFile {
    let program = std::env::current_exe().unwrap();
    let file = TempFile::new_in(program.parent().unwrap()).unwrap();
    let bytes: Vec<u8> = (0..len)
        .map(|i| u8::try_from(i / 512 % 255 + 1).unwrap())
        .collect();
    file.as_file().write_all(&bytes).unwrap();
    file
}

fn direct(image: &TempFile, engine: IoEngine) -> Block {
    let config = Config {
        direct: true,
        io_engine: Some(engine),
        cache_type: CacheType::Writeback,
        ..config(image)
    };
    config.build().unwrap()
}

fn write_and_read_back(engine: IoEngine) {
    let (image, mem) = (image_on_disk(64 * 4096), testing::memory(1 << 20));
    let (mut device, mut guest) = (direct(&image, engine), Guest::new(&mem));
    guest.activate(&mut device);
    let mut expected = content(&image);
    // Aligned; at an odd address; in pieces that are no whole sectors; one sector only.
    for (turn, pieces) in [
        vec![(DATA, 8192)],
        vec![(DATA + 3, 4096)],
        vec![(DATA, 100), (DATA + 9000, 4096 - 100)],
        vec![(DATA, 512)],
    ]
    .into_iter()
    .enumerate()
    {
        let sector = 8 * u64::try_from(turn).unwrap() + 16;
        let fill = 0xa0 + u8::try_from(turn).unwrap();
        let at = usize::try_from(sector).unwrap() * 512;
        let mut len = 0;
        for (address, count) in &pieces {
            guest.fill(*address, &vec![fill; *count]);
            len += count;
        }
        let piece = |&(address, count): &(u64, usize)| (address, u32::try_from(count).unwrap());
        let data: Vec<_> = pieces.iter().map(piece).map(|(a, n)| readable(a, n)).collect();
        guest.request_until_done(&mut device, OUT, sector, &data);
        expected[at..at + len].fill(fill);
        let data: Vec<_> = pieces.iter().map(piece).map(|(a, n)| writable(a, n)).collect();
        pieces
            .iter()
            .for_each(|(address, count)| guest.fill(*address, &vec![0; *count]));
        guest.request_until_done(&mut device, IN, sector, &data);
        for (address, count) in &pieces {
            assert_eq!(guest.bytes(*address, *count), vec![fill; *count], "turn {turn}");
        }
    }
    assert!(content(&image) == expected);
}

#[test]
fn aligned_and_other_requests_reach_the_disk() {
    write_and_read_back(IoEngine::Sync);
}

#[test]
fn aligned_and_other_requests_reach_the_disk_though_they_overlap() {
    write_and_read_back(IoEngine::Async);
}

#[test]
fn is_shown_when_it_is_set_only() {
    let image = image(512);
    let shown = |config: &Config| serde_json::to_string(config).unwrap();
    assert!(!shown(&config(&image)).contains("direct"));
    let direct = Config {
        direct: true,
        ..config(&image)
    };
    assert!(shown(&direct).ends_with(r#""socket":null,"direct":true}"#));
}

#[test]
fn a_file_system_without_it_is_named() {
    // Files of /proc cannot be opened so.
    let config = Config {
        direct: true,
        is_read_only: Some(true),
        path_on_host: Some("/proc/version".into()),
        ..config(&image(512))
    };
    let error = config.build().err().unwrap();
    assert!(matches!(error, OpenError::NotDirect { .. }), "{error:?}");
    assert!(error.to_string().contains("leave direct out"), "{error}");
}
