package ext4

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is the crc32c that metadata_csum uses: seeded with all ones and not inverted at the
// end, unlike the one of hash/crc32.
func checksum(b []byte) uint32 { return ^crc32.Update(0, castagnoli, b) }
