package bangerv1

// Revision is the API's revision. It grows with every change that a client or a daemon built
// before it would misunderstand; new fields and new calls alone do not. GetStatus and Shutdown, and the calls by which
// VMs are stopped (ListVMs, ResolveVMs, StopVM, WatchOperation), keep their meaning over all of them.
const Revision = 2 // 2: the dial socket has services

// RevisionHeader is the HTTP header with which client and daemon tell each other their Revision.
const RevisionHeader = "Banger-Api"
