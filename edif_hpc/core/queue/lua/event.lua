-- Events of an attempt, idempotent by their sequence numbers. Returns 1, or 0 when the attempt is no longer the current one.
-- ARGV: id, token, log_lines, then seq, status, description of each
local id, token = ARGV[1], ARGV[2]
local f = fields(id, 'token', 'seq', 'state')
if f[1] ~= token or f[3] ~= 'claimed' then return 0 end
report(id, now_ms(), tonumber(f[2] or '0'), 3, true)
return 1
