-- Forget an ended request at once, with all that it left. Returns {'deleted', object or ''...}, {its state} or {'unknown'}.
-- ARGV: id, user or '' (an admin)
local id, user = ARGV[1], ARGV[2]
local f = fields(id, 'state', 'user', 'object', 'data')
if not f[1] or (user ~= '' and f[2] ~= user) then return {'unknown'} end
if f[1] ~= 'done' then return {f[1]} end
local left = {'deleted'}
if f[3] and f[3] ~= '' then left[#left + 1] = f[3] end
local data = f[4] and f[4] ~= '' and cjson.decode(f[4]) or {}
if data['object'] then left[#left + 1] = data['object'] end
local now = now_ms()
for i = 2, #left do redis.call('ZADD', OBJECTS, now, left[i]) end  -- should whoever asked not come to delete them
redis.call('DEL', k_request(id), k_events(id), k_result(id), k_payload(id))
redis.call('ZREM', k_user(f[2]), id)
redis.call('ZREM', DEAD, id)
return left
