//! [`Backend`]: a negotiated connection, in terms of queues and configuration space.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, HEADER, NEED_REPLY, Request, parse_header, reply};
use crate::GuestMemory;
use crate::unix_socket;
use crate::virtio::QueueConfig;

/// The feature bit that says that there are protocol features; no driver sees it.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
mod protocol {
    pub(super) const MQ: u64 = 1 << 0;
    pub(super) const REPLY_ACK: u64 = 1 << 3;
    pub(super) const BACKEND_REQ: u64 = 1 << 5;
    pub(super) const CONFIG: u64 = 1 << 9;
    pub(super) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(super) const WANTED: u64 = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT_SHMFD;
}

/// The backend's own request that says that the configuration space has changed.
const CONFIG_CHANGED: u32 = 2;
/// What a backend may ask for at most while one event of its channel is served.
const MAX_BACKEND_REQUESTS: usize = 64;
/// The most regions of memory that a backend is told of.
const MAX_REGIONS: usize = 8;

/// Shared memory in which the backend notes what it works on, so that the next one can go on with it.
pub(super) struct Inflight {
    file: File,
    /// Size, offset, and the counts of queues and entries, as the backend has described it.
    description: Vec<u8>,
}

/// A queue to be started.
pub(super) struct Start<'a> {
    pub(super) index: u16,
    pub(super) config: &'a QueueConfig,
    /// The index of the available ring to begin with.
    pub(super) base: u16,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
}

/// A backend that has agreed on what both can.
pub(super) struct Backend {
    connection: Connection,
    /// Where it sends requests of its own, when it can.
    channel: Option<UnixStream>,
    /// The features that it offers to drivers.
    pub(super) features: u64,
    protocol: u64,
}

impl Backend {
    /// Connects to the socket at `path` and agrees on the protocol. Fails when the backend lacks what is needed for
    /// that many queues.
    pub(super) fn connect(path: &Path, queues: u16) -> io::Result<Self> {
        let lacks = |what: String| io::Error::new(io::ErrorKind::Unsupported, what);
        let mut connection = Connection::open(path)?;
        let features = connection.get_number(Request::GetFeatures)?;
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(lacks("it has no protocol features".into()));
        }
        let offered = connection.get_number(Request::GetProtocolFeatures)?;
        let protocol = offered & protocol::WANTED;
        if protocol & protocol::CONFIG == 0 {
            return Err(lacks("it has no configuration space".into()));
        }
        connection.set(Request::SetProtocolFeatures, &protocol.to_ne_bytes(), &[])?;
        if protocol & protocol::REPLY_ACK != 0 {
            connection.expect_acknowledgements();
        }
        connection.set(Request::SetOwner, &[], &[])?;
        let available = match protocol & protocol::MQ {
            0 => 1,
            _ => connection.get_number(Request::GetQueueNum)?,
        };
        if u64::from(queues) > available {
            return Err(lacks(format!(
                "it has {available} queues, and the drive asks for {queues}"
            )));
        }
        let channel = match protocol & protocol::BACKEND_REQ {
            0 => None,
            _ => Some(open_channel(&mut connection)?),
        };
        Ok(Self {
            connection,
            channel,
            features: features & !F_PROTOCOL_FEATURES,
            protocol,
        })
    }

    /// The first `len` bytes of its configuration space.
    pub(super) fn config_space(&mut self, len: usize) -> io::Result<Vec<u8>> {
        self.connection.begin();
        let size = u32::try_from(len).map_err(io::Error::other)?;
        let mut body = numbers32(&[0, size, 0]);
        let head = body.len();
        body.resize(head + len, 0);
        let answer = self.connection.get(Request::GetConfig, &body)?;
        match answer.split_at_checked(head) {
            Some((numbers, space)) if numbers[..8] == body[..8] && space.len() == len => Ok(space.into()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its configuration space has another size",
            )),
        }
    }

    /// Tells it the driver's features and where memory is, before queues (so many, of such a size) are started. Gives it
    /// the shared memory of what its predecessor was working on, or has it make some.
    pub(super) fn prepare(
        &mut self,
        mem: &GuestMemory,
        features: u64,
        queues: (u16, u16),
        inflight: &mut Option<Inflight>,
    ) -> io::Result<()> {
        self.connection.begin();
        let (features, keeps_inflight) = (features | F_PROTOCOL_FEATURES, self.keeps_inflight());
        let set = &mut self.connection;
        set.set(Request::SetFeatures, &features.to_ne_bytes(), &[])?;
        let (table, fds) = memory_table(mem)?;
        set.set(Request::SetMemTable, &table, &fds)?;
        if !keeps_inflight {
            *inflight = None;
            return Ok(());
        }
        let inflight = match inflight {
            Some(before) => before,
            None => inflight.insert(new_inflight(set, queues)?),
        };
        let fd = inflight.file.as_raw_fd();
        set.set(Request::SetInflightFd, &inflight.description, &[fd])
    }

    /// Whether it notes what it works on in shared memory.
    pub(super) fn keeps_inflight(&self) -> bool {
        self.protocol & protocol::INFLIGHT_SHMFD != 0
    }

    /// Starts a queue.
    pub(super) fn start(&mut self, mem: &GuestMemory, queue: &Start<'_>) -> io::Result<()> {
        let Start { config, .. } = queue;
        let index = u32::from(queue.index);
        let host = |address| {
            let place = mem.get_host_address(GuestAddress(address));
            place.map(|place| place.addr() as u64).map_err(io::Error::other)
        };
        let mut rings = numbers32(&[index, 0]);
        for address in [config.desc_table, config.used_ring, config.avail_ring] {
            rings.extend_from_slice(&host(address)?.to_ne_bytes());
        }
        rings.extend_from_slice(&0u64.to_ne_bytes());
        let which = u64::from(queue.index).to_ne_bytes();
        let set = &mut self.connection;
        set.set(
            Request::SetVringNum,
            &numbers32(&[index, config.size.into()]),
            &[],
        )?;
        set.set(
            Request::SetVringBase,
            &numbers32(&[index, queue.base.into()]),
            &[],
        )?;
        set.set(Request::SetVringAddr, &rings, &[])?;
        set.set(Request::SetVringCall, &which, &[queue.call.as_raw_fd()])?;
        set.set(Request::SetVringKick, &which, &[queue.kick.as_raw_fd()])?;
        set.set(Request::SetVringEnable, &numbers32(&[index, 1]), &[])
    }

    /// Stops a queue when what is in flight is done; gives the index of the available ring at which to go on.
    pub(super) fn stop(&mut self, index: u16) -> io::Result<u16> {
        self.connection.begin();
        let answer = self
            .connection
            .get(Request::GetVringBase, &numbers32(&[index.into(), 0]))?;
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "it gives no index of the queue");
        let base = answer.last_chunk::<4>().map(|base| u32::from_ne_bytes(*base));
        base.and_then(|base| u16::try_from(base).ok()).ok_or_else(wrong)
    }

    /// Begins what the backend is waited for at most once.
    pub(super) fn begin(&mut self) {
        self.connection.begin();
    }

    /// Whether it has gone.
    pub(super) fn is_broken(&self) -> bool {
        self.connection.is_broken()
    }

    /// Serves what it has asked for; whether that was to look at its configuration space.
    pub(super) fn config_has_changed(&self) -> io::Result<bool> {
        let Some(channel) = &self.channel else {
            return Ok(false);
        };
        let mut changed = false;
        for _ in 0..MAX_BACKEND_REQUESTS {
            let mut header = [0; HEADER];
            match unix_socket::receive(channel, &mut header, 0) {
                Ok(HEADER) => {}
                Ok(0) => break,
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            let (request, flags, size) = parse_header(&header);
            // What else backends ask for is not agreed on.
            if request != CONFIG_CHANGED || size != 0 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("it asks for {request}, which was not agreed on"),
                ));
            }
            changed = true;
            if flags & NEED_REPLY != 0 {
                unix_socket::send(channel, &reply(request, 0))?;
            }
        }
        Ok(changed)
    }

    /// What becomes readable when it has something to say: its end of the connection, and its channel.
    pub(super) fn fds(&self) -> (RawFd, Option<RawFd>) {
        let channel = self.channel.as_ref().map(AsRawFd::as_raw_fd);
        (self.connection.as_raw_fd(), channel)
    }
}

fn open_channel(connection: &mut Connection) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    connection.set(Request::SetBackendReqFd, &[], &[theirs.as_raw_fd()])?;
    Ok(ours)
}

/// Has the backend make its shared memory.
fn new_inflight(connection: &mut Connection, (queues, size): (u16, u16)) -> io::Result<Inflight> {
    let mut wanted = vec![0; 16];
    wanted.extend_from_slice(&queues.to_ne_bytes());
    wanted.extend_from_slice(&size.to_ne_bytes());
    // The structure ends on a whole number.
    wanted.resize(24, 0);
    let (description, file) = connection.get_with_file(Request::GetInflightFd, &wanted)?;
    match file {
        Some(file) if description.len() == wanted.len() => Ok(Inflight { file, description }),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it gives no inflight memory",
        )),
    }
}

/// All memory that is shared with other processes: a table of regions, and a descriptor for each.
fn memory_table(mem: &GuestMemory) -> io::Result<(Vec<u8>, Vec<RawFd>)> {
    let shared = mem
        .iter()
        .filter_map(|region| Some((region, region.file_offset()?)));
    let (mut table, mut fds) = (Vec::new(), Vec::new());
    for (region, file) in shared {
        let numbers = [
            region.start_addr().0,
            region.len(),
            region.as_ptr().addr() as u64,
            file.start(),
        ];
        numbers
            .iter()
            .for_each(|number| table.extend_from_slice(&number.to_ne_bytes()));
        fds.push(file.file().as_raw_fd());
    }
    if fds.is_empty() || fds.len() > MAX_REGIONS {
        return Err(io::Error::other(
            "the guest's memory is not shared with other processes",
        ));
    }
    let count = u32::try_from(fds.len()).map_err(io::Error::other)?;
    Ok(([numbers32(&[count, 0]), table].concat(), fds))
}

fn numbers32(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}
